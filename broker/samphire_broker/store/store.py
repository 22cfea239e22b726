"""The transitions of tasks, as one worker performs them.

Every call is one script on the broker: `lua/<verb>.lua`, with its keys at the top, and what scripts
share before it: `lua/shared/common.lua`, and those that it names as "With:".
"""

from __future__ import annotations

from samphire_broker.store.claims import Claims
from samphire_broker.store.liveness import Liveness
from samphire_broker.store.logs import Logs
from samphire_broker.store.outbox import Outbox
from samphire_broker.store.requests import Requests
from samphire_broker.store.rights import Rights


class Store(Claims, Logs, Outbox, Requests, Liveness, Rights):
    """One worker's hands on the store."""
