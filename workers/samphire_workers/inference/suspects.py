"""Running a task that may take down what it runs on: alone, so that whatever happens is its own doing."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from samphire_broker.store import Store, Tried
from samphire_workers.claims.unwritten import Unwritten
from samphire_workers.inference.alone import LOOK_S, Alone
from samphire_workers.inference.locks import ModelLocks
from samphire_workers.work import Work

LOSSES_MAX = 2
"""Endpoints that may die with a task before it is suspected: then it runs alone, without any other of any model."""


def is_suspect(before: Tried, max_attempts: int) -> bool:
    """Whether a task is to be alone with its model.

    All that a lost worker had started comes back at once, and most of it is innocent: it gets a second chance in
    company, if it has a third one alone.
    """
    return before.crashes > 0 and (before.crashes > 1 or before.attempts + 1 >= max_attempts)


class Suspects:
    """Lets one suspect of a model after the other be alone with it.

    Args:
        store: where it is known who is alone among all workers.
        locks: what everybody else goes through.
        unwritten: what has been at Triton, and whose end is not on the broker yet.
        others_end_s: how long a suspect waits for what other workers have under way, before it lets others go first.
        work: tells whether this worker hands everything back.
    """

    def __init__(
        self,
        store: Store,
        locks: ModelLocks,
        unwritten: Unwritten,
        others_end_s: float,
        work: Work,
    ) -> None:
        self._alone = Alone(store, work)
        self._locks = locks
        self._unwritten = unwritten
        self._others_end_s = others_end_s
        self._work = work
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One suspect of a model at a time waits for its lock."""

    async def run(
        self, model: str, run: Callable[[], Awaitable[bool]], *, all_models: bool, among_workers: bool
    ) -> bool:
        """Run one alone with its model, or with all of them, in this worker or among all workers.

        Args:
            model: of the suspect.
            run: starts it and brings it to its end; False if another worker is alone, and it is to be tried again.
            all_models: no other model runs meanwhile either.
            among_workers: nor does another worker run anything of it.

        Returns:
            Whether it has run; False: this worker is ending.
        """
        whom = "" if all_models else model
        while not self._work.is_handed_back:
            # Who waits for another worker holds no lock meanwhile, since that worker may wait for what a lock would
            # hold up; and only one suspect of a model waits at a time.
            async with self._turns[model]:
                if not among_workers:
                    await self._alone.until_nobody_else(whom)
                async with (
                    self._alone.hold(whom) if among_workers else nullcontext(),
                    self._locks.hold(model, alone=True, all_models=all_models),
                ):
                    if await self._run_inside(run, whom, among_workers):
                        return True
            await asyncio.sleep(LOOK_S)
        return False

    async def _run_inside(self, run: Callable[[], Awaitable[bool]], whom: str, among_workers: bool) -> bool:
        await self._unwritten.none_of(whom)  # what has been answered is not to be taken for the cause
        if among_workers and not await self._alone.others_end(whom, self._others_end_s):
            return False
        has_run = await run()
        await self._unwritten.none_of(whom)  # the next one may take the worker down, and with it what is not written
        return has_run
