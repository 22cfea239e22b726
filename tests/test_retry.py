"""Retries: the policy alone, and on real parts."""

from __future__ import annotations

import inspect
import itertools
import json
import time
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samphire import (
    Backoff,
    BrokerUnavailableError,
    Client,
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    PayloadTooLargeError,
    QueueFullError,
    SamphireError,
    TaskCancelledError,
    UnknownModelError,
    WorkerCrashError,
    errors,
)
from samphire.wire.contract import InferRequest
from samphire_broker.retry import REASONS, GiveUp, Retry, RetryPolicy, decide, policy_for, reason_of, wait_s
from samphire_broker.settings import Settings
from samphire_workers.settlement.outcome import TimeLimitError
from tests.stacks import Up, eventually
from tests.support.names import KEYS
from tests.support.plain import plain_celery

TIMEOUT_S = 30
POLICY = RetryPolicy(3, Backoff())
_numbers = itertools.count()


# -- the policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False])
def test_a_request_of_a_sequence_has_one_attempt(start: bool) -> None:
    """Whatever it says itself, and also where it begins the sequence."""
    parameters: dict[str, Any] = {"sequence_id": 7, "sequence_start": start}
    request = InferRequest("counter", [], parameters=parameters, max_attempts=5)
    assert policy_for(request, Settings()).max_attempts == 1


@pytest.mark.parametrize(
    "error", [EndpointTimeoutError(), EndpointUnavailableError(), QueueFullError(), BrokerUnavailableError()]
)
def test_what_may_pass_is_tried_again_within_the_budget(error: SamphireError) -> None:
    """The first two of three attempts are followed by another."""
    for attempt in (1, 2):
        assert isinstance(decide(error, attempt, inf, POLICY), Retry)
    assert isinstance(decide(error, 3, inf, POLICY), GiveUp)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InvalidInputError(), "invalid_input"),
        (UnknownModelError(), "invalid_input"),
        (PayloadTooLargeError(), "invalid_input"),
        (WorkerCrashError(), "worker_crash"),
        (TimeLimitError(1, soft=False), "timeout"),
    ],
)
def test_what_cannot_pass_is_a_dead_letter_at_once(error: SamphireError, reason: str) -> None:
    """Whatever the budget."""
    assert decide(error, 1, inf, RetryPolicy(100, Backoff())) == GiveUp(reason)


ERRORS = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, SamphireError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_a_reason_that_letters_are_filtered_by(kind: type[SamphireError]) -> None:
    """Also one that is added to the tree."""
    assert reason_of(kind()) in REASONS


def test_a_model_fault_is_tried_again_and_keeps_its_reason() -> None:
    """It may be the model's state, not the request."""
    assert isinstance(decide(ModelFaultError(), 1, inf, POLICY), Retry)
    assert decide(ModelFaultError(), 3, inf, POLICY) == GiveUp("model_fault")


def test_no_attempt_is_made_that_comes_too_late() -> None:
    """A retry at or after the deadline is of no use to anybody."""
    policy = RetryPolicy(3, Backoff(base_s=10, jitter=0))
    assert decide(EndpointTimeoutError(), 1, 111.0, policy, now=100.0) == Retry(110.0)
    assert decide(EndpointTimeoutError(), 1, 110.0, policy, now=100.0) == GiveUp("timeout")


def test_waits_double_up_to_the_cap() -> None:
    """Without jitter, as the formula says."""
    backoff = Backoff(base_s=1, cap_s=5, jitter=0)
    assert [wait_s(attempt, backoff, None, 0.3) for attempt in (1, 2, 3, 4, 1000)] == [1, 2, 4, 5, 5]


@given(
    attempt=st.integers(1, 100),
    base_s=st.floats(0, 100),
    cap_s=st.floats(0, 1000),
    jitter=st.floats(0, 1),
    chance=st.floats(0, 1),
    after_s=st.none() | st.floats(0, 1e6),
)
def test_a_wait_is_within_its_bounds(
    attempt: int, base_s: float, cap_s: float, jitter: float, chance: float, after_s: float | None
) -> None:
    """At most the cap, at least what the jitter leaves, and never sooner than was asked for."""
    backoff = Backoff(base_s, cap_s, jitter)
    longest = min(cap_s, base_s * 2.0 ** (attempt - 1))
    wait = wait_s(attempt, backoff, after_s, chance)
    assert wait >= (after_s or 0)
    assert wait <= max(longest * (1 + 1e-9), after_s or 0)
    assert wait >= longest * (1 - jitter) * (1 - 1e-9)


def test_full_jitter_spreads_over_the_whole_wait() -> None:
    """So that tasks that failed together do not come back together."""
    assert wait_s(1, Backoff(base_s=8), None, 0.0) == 0
    assert wait_s(1, Backoff(base_s=8), None, 1.0) == 8


def test_the_task_goes_before_its_model_and_that_before_the_rest() -> None:
    """Each value by itself."""
    settings = Settings(
        max_attempts=4,
        backoff_cap_s=9,
        model_retries={"m": {"max_attempts": 7, "backoff_base_s": 2}},  # type: ignore[dict-item]
    )
    assert policy_for(None, settings) == RetryPolicy(4, Backoff(cap_s=9))
    assert policy_for(InferRequest("other", []), settings) == RetryPolicy(4, Backoff(cap_s=9))
    assert policy_for(InferRequest("m", []), settings) == RetryPolicy(7, Backoff(2, 9))
    own = InferRequest("m", [], max_attempts=1, backoff=Backoff(jitter=0.5))
    assert policy_for(own, settings) == RetryPolicy(1, Backoff(jitter=0.5))


@pytest.mark.parametrize("values", [{"base_s": -1}, {"cap_s": inf}, {"jitter": 1.5}, {"jitter": -0.1}, {"base_s": "1"}])
def test_a_backoff_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    """By the name of the value."""
    with pytest.raises(InvalidInputError, match=next(iter(values))):
        Backoff(**values)


# -- on real parts -----------------------------------------------------------------------------------------


def flaky(failures: int) -> dict[str, Any]:
    """A task that fails so often before it succeeds."""
    number = time.time_ns() + next(_numbers)
    return {"task": np.array([[number]]), "failures": np.array([[failures]])}


def test_a_task_that_fails_twice_succeeds_at_its_third_attempt(client: Client, stack: Up) -> None:
    """Its neighbours are asked once, and nothing is left of the attempts."""
    good = [client.submit("flaky", flaky(0)) for _ in range(20)]
    task = client.submit("flaky", flaky(2))
    assert task.result(TIMEOUT_S).outputs["asked"].tolist() == [[3]]
    assert [each.result(TIMEOUT_S).outputs["asked"].tolist() for each in good] == [[[1]]] * 20
    with stack.redis() as server:
        assert not server.exists(KEYS.task_prefix + task.id)
        assert not server.sismember(KEYS.tried, task.id)
        assert server.zscore(KEYS.dead, task.id) is None


def test_between_attempts_a_task_waits_on_the_broker(client: Client, stack: Up) -> None:
    """In nobody's memory; its state says so; it can be cancelled there."""
    task = client.submit("flaky", flaky(1), backoff=Backoff(base_s=600, cap_s=600, jitter=0))
    eventually(lambda: task.status() == "retrying", TIMEOUT_S, "the retry")
    with stack.redis() as server:
        assert server.zscore(KEYS.scheduled, task.id) - time.time() > 300
        meta = json.loads(server.get(KEYS.meta_prefix + task.id))
        assert (meta["status"], meta["result"]["exc_type"]) == ("RETRY", "ModelFaultError")
        assert server.hget(KEYS.task_prefix + task.id, "attempts") == b"1"
    assert task.cancel() is True
    with pytest.raises(TaskCancelledError, match="before it ran"):
        task.result(TIMEOUT_S)


def test_the_budget_ends_it_with_its_whole_history(client: Client) -> None:
    """The letter tells when, where and with what each attempt ended."""
    task = client.submit("flaky", flaky(9), max_attempts=4, backoff=Backoff(base_s=0.05))
    with pytest.raises(ModelFaultError, match="not yet"):
        task.result(TIMEOUT_S)
    letter = client.dead_letters.get(task.id)
    assert (letter.reason, letter.attempts, letter.run) == ("model_fault", 4, 1)
    assert len(letter.history) == 4
    assert sorted(letter.history, key=lambda attempt: attempt.at) == list(letter.history)
    assert all("not yet" in attempt.error and attempt.worker.startswith("worker1@") for attempt in letter.history)


def test_a_budget_of_one_is_one_attempt(client: Client) -> None:
    """And what is invalid has none, whatever the budget."""
    task = client.submit("flaky", flaky(1), max_attempts=1)
    with pytest.raises(ModelFaultError):
        task.result(TIMEOUT_S)
    assert len(client.dead_letters.get(task.id).history) == 1


def test_no_retry_beyond_the_deadline(client: Client) -> None:
    """The error comes at once, not when the deadline has passed."""
    task = client.submit("flaky", flaky(1), deadline_s=300, backoff=Backoff(base_s=600, cap_s=600, jitter=0))
    with pytest.raises(ModelFaultError):
        task.result(TIMEOUT_S)


def test_a_redriven_task_begins_a_new_run(client: Client, stack: Up) -> None:
    """With a fresh budget; its events carry the run; who waits gets its end."""
    task = client.submit("flaky", flaky(2), max_attempts=2, backoff=Backoff(base_s=0.05))
    with pytest.raises(ModelFaultError):
        task.result(TIMEOUT_S)
    assert client.dead_letters.redrive([task.id]) == 1
    assert task.result(TIMEOUT_S).outputs["asked"].tolist() == [[3]]
    with stack.redis() as server:
        events = [fields for _, fields in server.xrange(client_stream(client))]
    told = [
        (state, fields.get(b"run")) for fields in events for state, ids in fields.items() if ids == task.id.encode()
    ]
    assert told == [(b"retrying", None), (b"failed", None), (b"redriven", b"2"), (b"succeeded", b"2")]


def client_stream(client: Client) -> str:
    return KEYS.own(client._client._session.stream)


@pytest.mark.parametrize(
    "options", [{"max_attempts": 0}, {"max_attempts": 101}, {"max_attempts": True}, {"backoff": 3}]
)
def test_a_budget_that_cannot_be_is_refused(client: Client, options: dict[str, Any]) -> None:
    """At submit; nothing is queued."""
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        client.submit("flaky", flaky(0), **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"max_attempts": 0}, "max_attempts"), ({"backoff": {"jitter": 2}}, "jitter"), ({"backoff": {"x": 1}}, "unknown")],
)
def test_a_plain_producers_budget_is_checked_too(stack: Up, options: dict[str, Any], told: str) -> None:
    """It becomes a dead letter with the reason."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    with plain_celery(stack.broker_url) as app:
        sent = app.send_task(
            "samphire.infer", kwargs={"model_name": "picky", "inputs": [tensor], **options}, queue="inference"
        )
        with pytest.raises(Exception, match=told):
            sent.get(timeout=TIMEOUT_S)


def test_a_plain_producer_sees_the_retry(stack: Up) -> None:
    """In Celery's own state, and with a budget of its own."""
    number = time.time_ns()
    inputs = [
        {"name": name, "datatype": "INT64", "shape": [1, 1], "data": [value]}
        for name, value in (("task", number), ("failures", 1))
    ]
    with plain_celery(stack.broker_url) as app:
        kwargs = {"model_name": "flaky", "inputs": inputs, "backoff": {"base_s": 1.5, "jitter": 0}}
        sent = app.send_task("samphire.infer", kwargs=kwargs, queue="inference")
        eventually(lambda: sent.state == "RETRY", TIMEOUT_S, "the retry")
        assert sent.get(timeout=TIMEOUT_S)["outputs"][0]["data"] == [2]
