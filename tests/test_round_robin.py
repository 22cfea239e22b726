"""Weighted round robin, and the byte budget."""

from __future__ import annotations

import asyncio

from samphire.wire import keys
from samphire_workers.claims.limits import AdaptiveLimits
from samphire_workers.inference.budget import ByteBudget
from samphire_workers.queues.round_robin import QUEUES_A_PLAN, RoundRobin


def shares_of(round_robin: RoundRobin, messages: int, skip: set[str] | None = None) -> dict[str, int]:
    plan = round_robin.plan(messages, skip or set())
    totals: dict[str, int] = {}
    for turn in plan.turns:
        queue, _ = keys.split_list(turn.list_key)
        assert plan.models[turn.group] == keys.parse_queue(queue)[0]
        totals[queue] = totals.get(queue, 0) + turn.share
    return totals


def test_models_share_by_weight_and_tenants_share_their_models_part() -> None:
    """A model with many tenants gets no more than one with a single queue."""
    round_robin = RoundRobin({"a": 3})
    round_robin.add(["inference.a", "inference.b@x", "inference.b@y"])
    shares = shares_of(round_robin, 1200)
    assert 880 <= shares["inference.a"] <= 900
    assert 140 <= shares["inference.b@x"] <= 150
    assert shares["inference.b@x"] == shares["inference.b@y"]


def test_turns_rotate() -> None:
    """With room for one message, each queue is first in turn."""
    round_robin = RoundRobin({})
    round_robin.add(["inference.a", "inference.b", "inference.c"])
    assert {round_robin.plan(1, set()).turns[0].list_key for _ in range(3)} == {
        "inference.a",
        "inference.b",
        "inference.c",
    }


def test_high_priorities_of_all_queues_come_before_low_ones() -> None:
    """The lists are ordered by priority first."""
    round_robin = RoundRobin({})
    round_robin.add(["inference.a", "inference.b"])
    steps = [keys.split_list(turn.list_key)[1] for turn in round_robin.plan(10, set()).turns]
    assert steps == sorted(steps)


def test_skipped_models_are_left_out() -> None:
    """And with all of them skipped there is no plan."""
    round_robin = RoundRobin({})
    round_robin.add(["inference.a", "inference.b"])
    assert set(shares_of(round_robin, 10, {"a"})) == {"inference.b"}
    assert round_robin.plan(10, {"a", "b"}).turns == []


def test_a_plan_for_named_queues_has_no_others() -> None:
    """Also for a queue that was not known yet."""
    round_robin = RoundRobin({})
    round_robin.add(["inference.a", "inference.b"])
    plan = round_robin.plan(10, set(), {"inference.b", "inference.new"})
    assert {keys.split_list(turn.list_key)[0] for turn in plan.turns} == {"inference.b", "inference.new"}
    assert round_robin.plan(10, {"b"}, {"inference.b"}).turns == []


def test_many_queues_are_all_looked_into_within_the_stated_rounds() -> None:
    """A claim looks into a bounded number of queues; every queue has its turn."""
    round_robin = RoundRobin({})
    queues = [f"inference.m{i}" for i in range(3 * QUEUES_A_PLAN + 1)]
    assert round_robin.add(queues) == sorted(queues)
    assert round_robin.add(queues) == []
    seen: set[str] = set()
    for _ in range(round_robin.rounds):
        plan = round_robin.plan(10, set())
        assert len(plan.turns) <= QUEUES_A_PLAN * len(keys.PRIORITY_STEPS)
        seen.update(keys.split_list(turn.list_key)[0] for turn in plan.turns)
    assert seen == set(queues)


def test_fast_models_are_claimed_far_ahead_and_slow_ones_are_not() -> None:
    """What is held grows while it is done soon, and shrinks to one when it is not."""
    limits = AdaptiveLimits(512)
    first = limits.room("m")
    for _ in range(10):
        limits.took("m", 0.01)
    assert limits.room("m") == 512
    limits.claimed("m")
    assert limits.room("m") == 511
    limits.let_go("m")
    for _ in range(20):
        limits.took("m", 2.0)
    assert limits.room("m") == 1
    assert limits.room("other") == first


def test_the_budget_is_never_exceeded_and_everyone_gets_a_turn() -> None:
    """Also one that wants more than there is, alone; a waiter that is cancelled leaves nothing behind."""

    async def test() -> None:
        budget, held, most = ByteBudget(100), 0, 0

        async def use(nbytes: int) -> None:
            nonlocal held, most
            async with budget.hold(nbytes):
                held += min(nbytes, 100)
                most = max(most, held)
                await asyncio.sleep(0)
                held -= min(nbytes, 100)

        users = [asyncio.create_task(use(n)) for n in [60, 60, 500, 10, 10, 90, 0, 100] * 20]
        await asyncio.sleep(0)
        users[5].cancel()
        results = await asyncio.gather(*users, return_exceptions=True)
        assert [type(result) for result in results].count(type(None)) == len(users) - 1
        assert most <= 100
        async with asyncio.timeout(1), budget.hold(100):
            pass

    asyncio.run(test())
