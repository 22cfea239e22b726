"""Train the shipped `digits` classifier: `python -m samphire_workers.training.digits model_repository`.

Two versions, as an example of a model that moved on: 1 is a small perceptron, 2 a small convolutional
network. Each is written as `digits/<version>/model.onnx`: `image` FP32 [rows, 8, 8] in, `probabilities` FP32
[rows, 10] out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from samphire_broker.digits import Digits, load_split

MINIMUM_ACCURACY = 0.97
SEED = 7


def perceptron() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(dim=1))


def convolutional() -> nn.Module:
    """Two convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
        nn.Softmax(dim=1),
    )


VERSIONS = {1: perceptron, 2: convolutional}


def train(model: nn.Module, digits: Digits, epochs: int = 100) -> float:
    """Fit `model`, and return its accuracy on the held-out images."""
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), 64):
            # A little noise: with 1,347 images a network otherwise learns them by heart.
            noisy = images[rows] + 0.05 * torch.randn_like(images[rows])
            loss: Tensor = nn.functional.nll_loss(torch.log(model(noisy) + 1e-9), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        said = model(torch.from_numpy(digits.held_out_images)).argmax(1).numpy()
    return float(np.mean(said == digits.held_out_labels))


def export(model: nn.Module, path: Path) -> None:
    """Write `model` as ONNX with a free batch dimension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 8, 8),),
        str(path),
        input_names=["image"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=1024)},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def main() -> None:
    """Train and write every version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_repository", type=Path)
    repository: Path = parser.parse_args().model_repository
    digits = load_split()
    for version, build in VERSIONS.items():
        torch.manual_seed(SEED)
        model = build()
        accuracy = train(model, digits)
        if accuracy < MINIMUM_ACCURACY:
            raise SystemExit(f"version {version}: expected an accuracy of {MINIMUM_ACCURACY}, reached {accuracy:.4f}")
        path = repository / "digits" / str(version) / "model.onnx"
        export(model, path)
        print(f"version {version}: accuracy {accuracy:.4f} on held-out images, {path.stat().st_size} bytes: {path}")


if __name__ == "__main__":
    main()
