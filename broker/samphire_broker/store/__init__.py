"""The task store: every transition of a task is one Lua script on the broker, one verb a file."""

from samphire_broker.store.records import (
    CANCELLED,
    DUE,
    NOT_PUSHED,
    NOT_YET,
    NOWHERE,
    REPLACED,
    WAS_CANCELLED,
    Claimed,
    Later,
    LeaseLostError,
    Letter,
    Letters,
    OtherEnd,
    Reaped,
    Settlement,
    Tried,
    Turn,
    WorkerInfo,
)
from samphire_broker.store.rights import Right, missing_rights
from samphire_broker.store.store import Store

__all__ = [
    "CANCELLED",
    "DUE",
    "NOT_PUSHED",
    "NOT_YET",
    "NOWHERE",
    "REPLACED",
    "WAS_CANCELLED",
    "Claimed",
    "Later",
    "LeaseLostError",
    "Letter",
    "Letters",
    "OtherEnd",
    "Reaped",
    "Right",
    "Settlement",
    "Store",
    "Tried",
    "Turn",
    "WorkerInfo",
    "missing_rights",
]
