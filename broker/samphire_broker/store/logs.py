"""The event logs of tasks, as workers write them."""

from __future__ import annotations

from collections.abc import Sequence

from samphire.transport.direct import Argument
from samphire_broker.store.calls import Calls
from samphire_broker.store.records import Appended, LogEntry, by_value

FOLLOWS_MAX = 500
FOLLOWED_MAX = 10_000
"""Most logs that are begun because somebody follows the task."""

_APPENDED = by_value(Appended)


class Logs(Calls):
    """All of it may be repeated after a lost reply: an entry that is there is not written again."""

    async def append(self, entries: Sequence[LogEntry]) -> list[Appended]:
        """Write entries into the logs of their tasks; what became of each."""
        args: list[Argument] = [self.worker_id, self.keys.task_prefix, self.keys.meta_prefix]
        for entry in entries:
            args += entry
        replies = await self._run("append", [self._inflight, self.keys.ended, self.keys.ended_before], args, self._logs)
        return [_APPENDED[reply] for reply in replies]

    async def serve_follows(self) -> int:
        """Begin the logs of tasks that clients follow, at most `FOLLOWS_MAX`; how many wishes were served."""
        args: list[Argument] = [self.keys.meta_prefix, self.keys.task_prefix, FOLLOWS_MAX, FOLLOWED_MAX]
        key_names = [self.keys.follows, self.keys.ended, self.keys.ended_before, self.keys.scheduled_messages]
        return int(await self._run("follow", key_names, args))
