"""The task store: every transition of a task is one Lua script on the broker, one verb a file."""

from samphire_broker.store.store import (
    Claimed,
    DeadLetter,
    LeaseLostError,
    Reaped,
    Settlement,
    Store,
    Turn,
    WorkerInfo,
)

__all__ = ["Claimed", "DeadLetter", "LeaseLostError", "Reaped", "Settlement", "Store", "Turn", "WorkerInfo"]
