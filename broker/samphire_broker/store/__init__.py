"""The task store: every transition of a task is one Lua script on the broker, one verb a file."""

from samphire_broker.store.store import (
    CANCELLED,
    DUE,
    NOT_YET,
    REPLACED,
    Claimed,
    Later,
    LeaseLostError,
    Letter,
    Letters,
    OtherEnd,
    Reaped,
    Settlement,
    Store,
    Tried,
    Turn,
    WorkerInfo,
)

__all__ = [
    "CANCELLED",
    "DUE",
    "NOT_YET",
    "REPLACED",
    "Claimed",
    "Later",
    "LeaseLostError",
    "Letter",
    "Letters",
    "OtherEnd",
    "Reaped",
    "Settlement",
    "Store",
    "Tried",
    "Turn",
    "WorkerInfo",
]
