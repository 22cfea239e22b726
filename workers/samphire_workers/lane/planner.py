"""Whose turn it is: weighted round robin over models, then tenants, then priorities."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from samphire import keys
from samphire_broker.store import Turn

PRIORITY_WEIGHTS = {0: 8, 3: 4, 6: 2, 9: 1}
"""Parts of a queue's share that each kombu priority step gets first; what one leaves, the next takes."""

QUEUES_A_PLAN = 64
"""Most queues that one claim looks into; with more, the claims take turns."""


PLANS_KEPT = 256


class Plan(NamedTuple):
    """Lists in the order of service; their groups are the models."""

    turns: list[Turn]
    models: list[str]


class QueuePlanner:
    """Divides each claim among the queues that the worker serves."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._queues: list[str] = []
        self._known: set[str] = set()
        self._turn = 0
        self._plans: dict[tuple[int, int, frozenset[str], frozenset[str]], Plan] = {}

    @property
    def rounds(self) -> int:
        """Claims that it takes to look into every queue once."""
        return max(1, -(-len(self._queues) // QUEUES_A_PLAN))

    def add(self, queues: Collection[str]) -> list[str]:
        """Serve these queues too; returns those that are new."""
        new = sorted(set(queues) - self._known)  # asked with every claim, and nearly always nothing
        if new:
            self._known.update(new)
            self._queues = sorted([*self._queues, *new])
            self._plans.clear()
        return new

    @property
    def queues(self) -> list[str]:
        """The queues that are served, sorted."""
        return self._queues

    def plan(self, messages: int, skip_models: Collection[str], only: Collection[str] = ()) -> Plan:
        """Divide a claim of `messages`, among some queues if they are named; the next call begins with the next."""
        queues = sorted(only) if only else self._queues
        usable = [queue for queue in queues if keys.parse_queue(queue)[0] not in skip_models]
        if not usable:
            return Plan([], [])
        start = self._turn % len(usable)
        self._turn += QUEUES_A_PLAN if len(usable) > QUEUES_A_PLAN else 1
        known = (start, messages, frozenset(skip_models), frozenset(only))
        plan = self._plans.get(known)
        if plan is None:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            plan = self._plans[known] = self._divide((usable[start:] + usable[:start])[:QUEUES_A_PLAN], messages)
        return plan

    def _divide(self, turn: list[str], messages: int) -> Plan:
        tenants: dict[str, int] = {}
        for queue in turn:
            model = keys.parse_queue(queue)[0]
            tenants[model] = tenants.get(model, 0) + 1
        total = sum(self._weights.get(model, 1) for model in tenants)
        models = list(tenants)
        turns: list[Turn] = []
        for priority in keys.PRIORITY_STEPS:
            part = PRIORITY_WEIGHTS[priority] / sum(PRIORITY_WEIGHTS.values())
            for queue in turn:
                model = keys.parse_queue(queue)[0]
                share = messages * self._weights.get(model, 1) / total / tenants[model]
                list_key = keys.queue_list(queue, priority)
                turns.append(Turn(list_key, max(1, int(share * part)), models.index(model)))
        return Plan(turns, models)
