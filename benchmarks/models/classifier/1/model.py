"""Classifies all requests that Triton hands over together in one batch."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
from network import classifier, scores


class TritonPythonModel:
    """A Python model of Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network to where it runs."""
        torch.set_num_threads(1)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = classifier().to(self.device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer them."""
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        batch = torch.from_numpy(np.concatenate(images)).to(self.device)
        answers = scores(self.network, batch).cpu().numpy()
        parts = np.split(answers, np.cumsum([len(image) for image in images])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("scores", np.ascontiguousarray(part))]) for part in parts]
