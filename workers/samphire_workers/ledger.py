"""What a lane holds: claimed, and not yet settled or back in its queue."""

from __future__ import annotations

from collections.abc import Sequence

from samphire_broker.store import Claimed
from samphire_workers.claiming.limits import AdaptiveLimits
from samphire_workers.intake.request import Request, home_of


class Ledger:
    """The claims of a lane, their requests as far as they are read, and their bytes."""

    def __init__(self, limits: AdaptiveLimits) -> None:
        self._limits = limits
        self._claims: dict[str, tuple[str, int]] = {}
        """Model and bytes, by claim."""
        self._requests: dict[str, Request] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._claims)

    def fields(self) -> set[str]:
        """The claims."""
        return set(self._claims)

    def requests(self) -> list[Request]:
        """Those that are read."""
        return list(self._requests.values())

    def request(self, field: str) -> Request | None:
        """The request of a claim, if it is still held."""
        return self._requests.get(field)

    def some_of(self, model: str) -> bool:
        """Whether there are any of a model."""
        return any(held == model for held, _ in self._claims.values())

    def add(self, claim: Claimed) -> None:
        """It was claimed."""
        model, _ = home_of(claim.list_key)
        self._claims[claim.field] = (model, len(claim.message))
        self.nbytes += len(claim.message)
        self._limits.claimed(model)

    def has_read(self, request: Request) -> None:
        """The request of a claim is read."""
        self._requests[request.claim.field] = request

    def let_go(self, fields: Sequence[str]) -> None:
        """They are settled, or back in their queues."""
        for field in fields:
            if field not in self._claims:
                continue
            model, nbytes = self._claims.pop(field)
            self._requests.pop(field, None)
            self.nbytes -= nbytes
            self._limits.let_go(model)
