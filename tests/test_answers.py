"""Every answer is right: nobody gets another's rows, and what does not fit the model's signature is no answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from samphire import Backoff, Client, ModelFaultError, ModelSignature, TensorSpec
from samphire_broker.settings import Settings
from samphire_workers.intake.checking import Checker
from samphire_workers.triton.answers import UnevenRowsError, check_answer
from samphire_workers.triton.messages import Tensor
from tests.stacks import Up

TIMEOUT_S = 30


def x(*values: float) -> dict[str, NDArray[Any]]:
    return {"x": np.array([values], np.float32)}


def test_what_the_config_does_not_join_is_not_joined(client: Client) -> None:
    """A model without dynamic_batching, whose answer depends on its neighbours, is asked as Triton would ask it."""
    shares = client.map("share", [x(n) for n in range(1, 65)])
    assert [result.outputs["y"].tolist() for result in shares] == [[[1.0]]] * 64
    asked = [[-1.0] * (n % 3) + [float(n)] * (n % 4) for n in range(64)]
    found = list(client.map("detector", [x(*values, -1.0) for values in asked]))
    assert [result.outputs["found"].ravel().tolist() for result in found] == [
        [value for value in values if value > 0] for values in asked
    ]


def test_a_model_that_should_not_be_joined_is_noticed(client: Client, stack: Up) -> None:
    """It has dynamic_batching, and answers with other rows than it was given: it is asked alone; that is said once."""
    asked = [[float(n)] * (n % 4) for n in range(1, 65)]
    found = list(client.map("uneven", [x(*values, -1.0) for values in asked]))
    assert [result.outputs["found"].ravel().tolist() for result in found] == asked
    noted = [line for line in stack.worker_log().splitlines() if "model 'uneven'" in line and "not joined" in line]
    assert len(noted) == 1


@pytest.mark.parametrize(
    ("how", "company"),
    [
        ("row", "alone"),
        *[(how, who) for how in ("shape", "datatype", "missing", "nothing") for who in ("alone", "among others")],
    ],
)
def test_an_answer_that_does_not_fit_is_the_models_fault(client: Client, how: str, company: str) -> None:
    """Alone, or in a micro-batch, where the neighbours get theirs."""
    rows = [how] if company == "alone" else ["fine"] * 3 + [how] + ["fine"] * 4
    batches = [{"how": np.array([[row.encode()]], np.object_)} for row in rows]
    tasks = [client.submit("misbehaving", inputs, max_attempts=1) for inputs in batches]
    for row, task in zip(rows, tasks, strict=True):
        if row == "fine":
            assert task.result(TIMEOUT_S).outputs["y"].tolist() == [[1.0, 1.0]]
        else:
            with pytest.raises(ModelFaultError, match=r"model 'misbehaving'.*expected"):
                task.result(TIMEOUT_S)


def test_an_answer_that_was_not_asked_for(client: Client) -> None:
    """Only what was asked for returns; what is asked for must be there."""
    fine = {"how": np.array([[b"fine"]], np.object_)}
    assert set(client.submit("misbehaving", fine, outputs=["z"]).result(TIMEOUT_S).outputs) == {"z"}
    missing = {"how": np.array([[b"missing"]], np.object_)}
    with pytest.raises(ModelFaultError, match="expected the outputs 'z'"):
        client.submit("misbehaving", missing, outputs=["z"], max_attempts=1, backoff=Backoff(0)).result(TIMEOUT_S)


Y, Z = TensorSpec("y", "FP32", (2,)), TensorSpec("z", "FP32", (2,))
SIGNATURE = ModelSignature("m", ("1",), {"x": TensorSpec("x", "FP32", (1,))}, {"y": Y}, 8, dynamic_batching=True)
OPTIONAL = ModelSignature(
    "m",
    ("1",),
    {"x": TensorSpec("x", "FP32", (1,), optional=True)},
    SIGNATURE.outputs | {"z": SIGNATURE.outputs["y"]},
    0,
)
ONE = Tensor("y", "FP32", [1, 2], b"\0" * 8)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([ONE, ONE], "twice"),
        ([ONE, ONE._replace(name="w")], "not asked for"),
        ([ONE._replace(data=b"\0" * 7)], "takes 8 bytes, given 7"),
        ([ONE._replace(shape=[])], "expected shape"),
        ([ONE._replace(shape=[-1, 2])], "dimensions from 0"),
        ([ONE._replace(datatype="FP64", data=b"\0" * 16)], "expected FP32, answered FP64"),
        ([], "expected the outputs 'y', answered"),
    ],
)
def test_what_an_answer_must_be(answer: list[Tensor], text: str) -> None:
    """By name, datatype, shape and size."""
    with pytest.raises(ModelFaultError, match=text):
        check_answer(SIGNATURE, [], 1, answer, even=False)


def test_rows_count_where_they_may_be_joined() -> None:
    """Elsewhere a model may answer with as many as it likes; with optional inputs, outputs may be left out too."""
    two = ONE._replace(shape=[2, 2], data=b"\0" * 16)
    check_answer(SIGNATURE, [], 1, [two], even=False)
    check_answer(OPTIONAL, [], 1, [ONE._replace(shape=[2])], even=True)
    with pytest.raises(UnevenRowsError, match="expected 1 rows"):
        check_answer(SIGNATURE, [], 1, [two], even=True)


@pytest.mark.parametrize(
    ("dynamic_batching", "setting", "joins"),
    [(True, {}, True), (False, {}, False), (True, {"m": False}, False), (False, {"m": True}, True)],
)
def test_who_is_joined(dynamic_batching: bool, setting: dict[str, bool], joins: bool) -> None:
    """The model's config says so, and the setting overrides it both ways; not where there is no batch dimension."""
    signature = ModelSignature("m", ("1",), {}, {}, 8, dynamic_batching=dynamic_batching)
    assert Checker(signature, Settings(micro_batch=setting)).joins is joins
    unbatched = ModelSignature("m", ("1",), {}, {}, 0, dynamic_batching=dynamic_batching)
    assert not Checker(unbatched, Settings(micro_batch=setting)).joins
