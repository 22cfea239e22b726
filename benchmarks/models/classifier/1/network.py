"""The network, for the model and for whoever checks its answers."""

import torch
from torch import Tensor, nn

WIDTH = 32
BLOCKS = 3
CLASSES = 10
SEED = 0


class Block(nn.Module):
    """Two convolutions beside a straight way; half the size, twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.straight = nn.Conv2d(width, 2 * width, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.straight(x))


def classifier() -> nn.Module:
    """UINT8 [n, 3, height, width] as floats from 0 to 1, to FP32 [n, 10]; the same weights every time."""
    torch.manual_seed(SEED)
    blocks = [Block(WIDTH * 2**number) for number in range(BLOCKS)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH * 2**BLOCKS, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), *blocks, *head).eval()


def scores(network: nn.Module, images: Tensor) -> Tensor:
    """The network's answer to UINT8 images, in full FP32: a GPU must not round as it likes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        answer: Tensor = network(images.float() / 255)
        return answer
