"""Endpoints that disagree on what a model takes: that is said by name, and no valid request is refused by chance."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from samphire import Client, InvalidInputError, ModelSignature, TensorSpec
from samphire_workers.triton.signatures import Signatures
from tests.stacks import Up, Valkey, eventually, running_stack
from tests.support.names import KEYS
from tests.workers import running_worker

TIMEOUT_S = 30
CONFIG = """
name: "two_faced"
backend: "python"
max_batch_size: 8
input [ {{ name: "x", data_type: TYPE_{datatype}, dims: [ 1 ] }} ]
output [ {{ name: "y", data_type: TYPE_{datatype}, dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
dynamic_batching {{ }}
"""
MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
"""


def write_model(repository: Path, datatype: str) -> None:
    (repository / "two_faced" / "1").mkdir(parents=True, exist_ok=True)
    (repository / "two_faced" / "config.pbtxt").write_text(CONFIG.format(datatype=datatype))
    (repository / "two_faced" / "1" / "model.py").write_text(MODEL)


def load(address: str) -> None:
    with InferenceServerClient(address) as triton:
        triton.load_model("two_faced")


def test_the_first_endpoint_counts(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """The other is not asked until it takes the same; then it is."""
    write_model(stack.data_dir / "model_repository", "FP32")
    load(stack.triton_grpc)
    write_model(tmp_path / "models", "INT32")
    with running_stack(tmp_path / "second", "--model-repository", str(tmp_path / "models")) as second:
        urls = f"{stack.triton_grpc},{second.triton_grpc}"
        with running_worker(tmp_path / "w", valkey.url, urls) as worker, Client(valkey.url) as client:

            def first_is_known() -> bool:  # until it answers, the other counts
                signature = client.signature("two_faced")
                return signature is not None and signature.inputs["x"].datatype == "FP32"

            eventually(first_is_known, TIMEOUT_S, "the signature of the first endpoint")
            tasks = [client.submit("two_faced", {"x": np.array([[n]], np.float32)}) for n in range(120)]
            assert [int(task.result(TIMEOUT_S).outputs["y"][0, 0]) for task in tasks] == list(range(120))
            assert not valkey.client.zcard(KEYS.dead)
            told = f"model two_faced differs between endpoints: {stack.triton_grpc} takes (x FP32[1]) -> (y FP32[1])"
            assert told in worker.log() and f"{second.triton_grpc} takes (x INT32[1])" in worker.log()
            assert asked(second.triton_grpc) == 0
            with pytest.raises(InvalidInputError, match="expected FP32, given INT32"):
                client.submit("two_faced", {"x": np.array([[1]], np.int32)})
            write_model(second.data_dir / "model_repository", "FP32")
            load(second.triton_grpc)

            def both_are_asked() -> bool:
                client.submit("two_faced", {"x": np.ones((1, 1), np.float32)}).result(TIMEOUT_S)
                return asked(second.triton_grpc) > 0

            eventually(both_are_asked, TIMEOUT_S, "requests to the second endpoint")
            write_model(second.data_dir / "model_repository", "INT32")
            load(second.triton_grpc)  # while requests go there
            tasks = [client.submit("two_faced", {"x": np.array([[n]], np.float32)}) for n in range(120)]
            assert [int(task.result(TIMEOUT_S).outputs["y"][0, 0]) for task in tasks] == list(range(120))
            assert not valkey.client.zcard(KEYS.dead)
            assert worker.log().count("differs between endpoints") == 2


def asked(address: str) -> int:
    with InferenceServerClient(address) as triton:
        stats = triton.get_inference_statistics("two_faced").model_stats
    return sum(int(version.inference_count) for version in stats)


def test_what_counts_as_different(caplog: pytest.LogCaptureFixture) -> None:
    """Tensors and batch size do, versions do not; it is said once, and again when it has changed."""
    one = ModelSignature("m", ("1",), {"x": TensorSpec("x", "FP32", (1,))}, {}, 8)
    newer = ModelSignature("m", ("1", "2"), one.inputs, {}, 8, dynamic_batching=True)
    other = ModelSignature("m", ("1",), one.inputs, {}, 4)
    with caplog.at_level(logging.ERROR):
        seen = Signatures(["a", "b", "c"])
        seen.note("b", one)
        assert seen.differing("m", "abc") == []
        seen.note("c", newer)
        assert seen.differing("m", "abc") == []
        seen.note("a", other)
        assert seen.differing("m", "abc") == ["b", "c"] == seen.differing("m", "abc")
        assert len(caplog.records) == 2 and "max_batch_size 4" in caplog.text
        assert seen.differing("m", "bc") == [], "one that does not answer counts for nothing"
        seen.forget("a", "m")
        assert seen.differing("m", "abc") == []
        seen.note("c", other)
        assert seen.differing("m", "abc") == ["c"] and len(caplog.records) == 3
