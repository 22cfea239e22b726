"""Whose turn it is: weighted round robin over models, then tenants, then priorities."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from samphire.wire import keys
from samphire_broker.store import Turn

QUEUES_A_PLAN = 64
"""Most queues that one claim looks into; with more, the claims take turns."""


PLANS_KEPT = 256


class Plan(NamedTuple):
    """Lists in the order of service; their groups are the models."""

    turns: list[Turn]
    models: list[str]


class RoundRobin:
    """Divides each claim among the queues that the worker serves, but for those that were seen empty."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._queues: list[str] = []
        self._known: set[str] = set()
        self._empty: set[str] = set()
        """Those of the known ones that no claim looks into."""
        self._turn = 0
        self._usable: dict[frozenset[str], list[str]] = {}
        self._plans: dict[tuple[int, int, frozenset[str], frozenset[str]], Plan] = {}

    @property
    def rounds(self) -> int:
        """Claims that it takes to look once into every queue that may hold something."""
        return max(1, -(-len(self._queues) // QUEUES_A_PLAN))

    def add(self, queues: Collection[str]) -> list[str]:
        """Serve these queues too; returns those that are new."""
        new = sorted(set(queues) - self._known)  # asked with every claim, and nearly always nothing
        if new:
            self._known.update(new)
            self._serve([*self._queues, *new])
        return new

    def set_aside(self, queues: Collection[str]) -> None:
        """Look no more into these of the known queues: they are empty."""
        if gone := set(queues) & self._known - self._empty:
            self._empty |= gone
            self._serve(queue for queue in self._queues if queue not in gone)

    def take_up(self, queues: Collection[str]) -> set[str]:
        """Look into these again, if they were set aside; returns those that were."""
        if back := self._empty.intersection(queues):
            self._empty -= back
            self._serve([*self._queues, *back])
        return back

    def forget(self, queues: Collection[str]) -> None:
        """Serve these no more, until they are added again."""
        self.set_aside(queues)
        self._empty.difference_update(queues)
        self._known.difference_update(queues)

    def _serve(self, queues: Iterable[str]) -> None:
        self._queues = sorted(queues)
        self._usable.clear()
        self._plans.clear()

    @property
    def queues(self) -> list[str]:
        """The queues that are served, sorted."""
        return sorted(self._known)

    @property
    def in_use(self) -> list[str]:
        """Those of them that may hold something, sorted."""
        return self._queues

    def lists(self) -> list[str]:
        """Names of the lists of those that may hold something."""
        return [name for queue in self._queues for name in keys.queue_lists(queue)]

    @property
    def are_many(self) -> bool:
        """Whether there are more queues than one claim looks into."""
        return len(self._known) > QUEUES_A_PLAN

    def plan(self, messages: int, skip_models: Collection[str], only: Collection[str] = ()) -> Plan:
        """Divide a claim of `messages`, among some queues if they are named; the next call begins with the next."""
        skipped = frozenset(skip_models)
        usable = _without(skipped, sorted(only)) if only else self._without(skipped)
        if not usable:
            return Plan([], [])
        start = self._turn % len(usable)
        self._turn += QUEUES_A_PLAN if len(usable) > QUEUES_A_PLAN else 1
        known = (start, messages, skipped, frozenset(only))
        plan = self._plans.get(known)
        if plan is None:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            turn = usable[start : start + QUEUES_A_PLAN]
            turn += usable[: min(start, QUEUES_A_PLAN - len(turn))]
            plan = self._plans[known] = self._divide(turn, messages)
        return plan

    def _without(self, skipped: frozenset[str]) -> list[str]:
        found = self._usable.get(skipped)
        if found is None:
            if len(self._usable) >= PLANS_KEPT:
                self._usable.clear()
            found = self._usable[skipped] = _without(skipped, self._queues)
        return found

    def _divide(self, turn: list[str], messages: int) -> Plan:
        tenants: dict[str, int] = {}
        for queue in turn:
            model = keys.parse_queue(queue)[0]
            tenants[model] = tenants.get(model, 0) + 1
        total = sum(self._weights.get(model, 1) for model in tenants)
        models = list(tenants)
        turns: list[Turn] = []
        for priority in keys.PRIORITY_STEPS:
            part = keys.PRIORITY_WEIGHTS[priority] / sum(keys.PRIORITY_WEIGHTS.values())
            for queue in turn:
                model = keys.parse_queue(queue)[0]
                share = messages * self._weights.get(model, 1) / total / tenants[model]
                list_key = keys.queue_list(queue, priority)
                turns.append(Turn(list_key, max(1, int(share * part)), models.index(model)))
        return Plan(turns, models)


def _without(skipped: Collection[str], queues: Sequence[str]) -> list[str]:
    return [queue for queue in queues if keys.parse_queue(queue)[0] not in skipped]
