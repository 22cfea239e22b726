"""A connection whose next replies are lost: the script runs, and its caller does not learn that it did."""

from __future__ import annotations

from typing import Any

from samphire.errors import BrokerUnavailableError
from samphire.transport.address import Address
from samphire.transport.direct import COMMAND_TIMEOUT_S, Argument, DirectConnection


class LossyConnection(DirectConnection):
    """The real connection; after `lose_next` the reply of the next script is thrown away, and the connection closed."""

    def __init__(self, address: Address, *, name: str | None = None) -> None:
        super().__init__(address, name=name)
        self.lose_next = False

    async def execute(self, *command: Argument, timeout_s: float = COMMAND_TIMEOUT_S, repeatable: bool = False) -> Any:
        """As the real one; a script that the server does not know yet has not run, so its reply is not the one."""
        reply = await super().execute(*command, timeout_s=timeout_s, repeatable=repeatable)
        if self.lose_next and command[0] == "EVALSHA":
            self.lose_next = False
            await self.close()
            raise BrokerUnavailableError("the reply was thrown away")
        return reply
