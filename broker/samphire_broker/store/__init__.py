"""The task store: every transition of a task is one Lua script on the broker, one verb a file."""

from samphire_broker.store.records import (
    NOWHERE,
    Claimed,
    Later,
    LeaseLostError,
    Led,
    Letter,
    LetterCounts,
    Looked,
    OtherDeploymentError,
    OtherEnd,
    Reaped,
    Scheduled,
    Settled,
    Settlement,
    Started,
    Tried,
    Turn,
    WorkerInfo,
)
from samphire_broker.store.rights import Right, missing_rights
from samphire_broker.store.store import Store

__all__ = [
    "NOWHERE",
    "Claimed",
    "Later",
    "LeaseLostError",
    "Led",
    "Letter",
    "LetterCounts",
    "Looked",
    "OtherDeploymentError",
    "OtherEnd",
    "Reaped",
    "Right",
    "Scheduled",
    "Settled",
    "Settlement",
    "Started",
    "Store",
    "Tried",
    "Turn",
    "WorkerInfo",
    "missing_rights",
]
