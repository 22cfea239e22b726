"""How an endpoint fares: pure, so time is a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samphire_broker.webhooks.endpoint import encode
from samphire_workers.webhooks.health import (
    FAILURES_TO_DISABLE,
    FAILURES_TO_OPEN,
    GAP_MOST_S,
    OPEN_FIRST_S,
    OPEN_MOST_S,
    THROTTLED_MOST_S,
    Health,
    Rate,
    decode_health,
)

DAY_S = 86_400.0
AFTER_S = 5 * DAY_S


def failing(health: Health, times: int, every_s: float, begin: float = 1000.0) -> float:
    now = begin
    for _ in range(times):
        health.failed(now, "no")
        now += every_s
    return now - every_s


def test_the_breaker_opens_lets_one_through_and_closes() -> None:
    """It stays open longer each time, up to a bound; one success closes it."""
    health = Health()
    now = failing(health, FAILURES_TO_OPEN - 1, 1)
    assert health.may_send(now) is None
    health.failed(now, "no")
    waits = []
    for _ in range(12):
        assert health.may_send(now) == 0 and health.waits_s(now) > 0
        now = health.open_until
        assert health.may_send(now) == 1
        health.failed(now, "no")
        waits.append(health.open_until - now)
    assert waits == sorted(waits) and waits[-1] == OPEN_MOST_S
    assert health.succeeded() and health.may_send(now) is None and health.is_well
    assert not health.succeeded()


def test_many_that_fail_at_once_count_as_one() -> None:
    """A receiver that restarts fails all that was under way: it is left alone for seconds, not for minutes."""
    health = Health()
    for number in range(200):
        health.failed(1000.0 + number / 1000, "no")
    assert health.waits_s(1000.2) < OPEN_FIRST_S
    throttled = Health()
    for number in range(200):
        throttled.throttle(1000.0 + number / 1000, None)
    assert throttled.waits_s(1000.2) < 1.0
    throttled.throttle(1000.3, 60.0)
    assert throttled.waits_s(1000.3) == 60.0


def test_what_is_kept_is_what_was() -> None:
    """The next leader goes on with it: neither a burst nor days of rest."""
    health = Health()
    now = failing(health, 8, 1)
    again = decode_health(encode(health))
    assert again == health and again.may_send(again.open_until) == 1 and again.may_send(now) == 0


@pytest.mark.parametrize(("asked", "waits"), [(None, 1.0), (0.0, 0.0), (90.0, 90.0), (1e9, THROTTLED_MOST_S)])
def test_a_throttled_endpoint_is_left_alone(asked: float | None, waits: float) -> None:
    """As long as it asks for, within a bound; one at a time afterwards."""
    health = Health()
    health.throttle(1000.0, asked)
    assert health.waits_s(1000.0) == waits
    assert health.may_send(1000.0 + waits) == 1
    health.throttle(9000.0, None)
    assert health.waits_s(9000.0) == 2.0


def test_one_failure_or_two_far_apart_disable_nothing() -> None:
    """Nobody knows how it fared in between."""
    health = Health()
    health.failed(0.0, "no")
    assert health.failing_part(AFTER_S) == 0
    health.failed(5 * DAY_S, "no")
    assert health.failing_part(AFTER_S) == 0 and health.failing_since == 5 * DAY_S
    few = Health()
    failing(few, FAILURES_TO_DISABLE - 1, DAY_S)
    assert few.failing_part(AFTER_S) == 0


def test_failures_alone_for_so_long_disable_with_warnings_before() -> None:
    """At 50, 70 and 90 percent; a success in between begins anew."""
    health, now, levels = Health(), 0.0, []
    while health.failing_part(AFTER_S) < 1:
        health.failed(now, "no")
        levels.append(health.warning_level(AFTER_S))
        now += 3600
    assert sorted(set(levels)) == [0, 50, 70, 90] and levels == sorted(levels)
    assert now - 3600 == AFTER_S
    assert health.succeeded() and health.warning_level(AFTER_S) == 0


@given(st.lists(st.tuples(st.floats(0, 2 * GAP_MOST_S), st.booleans()), max_size=60))
def test_it_is_disabled_only_by_failures_alone(steps: list[tuple[float, bool]]) -> None:
    """Whatever the order: since the last success, without a gap of more than a day, at least ten, over five days."""
    health, now, streak = Health(), 1000.0, list[float]()
    for wait_s, good in steps:
        now += wait_s
        if good:
            health.succeeded()
            streak = []
            continue
        if streak and now - streak[-1] > GAP_MOST_S:
            streak = []
        streak.append(now)
        health.failed(now, "no")
        expected = len(streak) >= FAILURES_TO_DISABLE and streak[-1] - streak[0] >= AFTER_S
        assert (health.failing_part(AFTER_S) >= 1) == expected


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 10), max_size=50))
def test_a_rate_is_never_passed(per_s: float, pauses: list[float]) -> None:
    """Over any time: that many, and a second's more at its begin."""
    rate, now, sent = Rate(per_s), 0.0, 0
    for pause in pauses:
        now += pause
        count = rate.allowed(now)
        rate.take(count)
        sent += count
        assert sent <= max(1.0, per_s) + per_s * now + 1e-6
    assert rate.next_s() >= 0
