"""`manage.py samphire_relay`: submit what the outbox holds, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from typing import Any

from django.core.management.base import BaseCommand
from django.db import InterfaceError, OperationalError, ProgrammingError, close_old_connections

from samphire.client.sync import Client
from samphire.contrib.django.models import OutboxTask
from samphire.contrib.outbox import Relay


class Rows:
    """The outbox as a relay reads it."""

    away: tuple[type[Exception], ...] = (OperationalError, InterfaceError, ProgrammingError)

    def __init__(self, using: str | None) -> None:
        self._using = using

    def waiting(self, most: int, without: Collection[str]) -> Sequence[tuple[int, str]]:
        """See `samphire.contrib.outbox.Rows`."""
        close_old_connections()  # a database that was away is asked anew
        waiting = OutboxTask.objects.using(self._using).filter(refused="").exclude(queue__in=list(without))
        return list(waiting.order_by("id").values_list("id", "queue")[:most])

    def read(self, number: int) -> str | None:
        """See `samphire.contrib.outbox.Rows`."""
        found: str | None = (
            OutboxTask.objects.using(self._using).filter(id=number).values_list("task", flat=True).first()
        )
        return found

    def sent(self, numbers: Sequence[int]) -> None:
        """See `samphire.contrib.outbox.Rows`."""
        OutboxTask.objects.using(self._using).filter(id__in=numbers).delete()

    def refused(self, number: int, why: str) -> None:
        """See `samphire.contrib.outbox.Rows`."""
        OutboxTask.objects.using(self._using).filter(id=number).update(refused=why)


class Command(BaseCommand):
    """Submit what the outbox holds, with the broker of SAMPHIRE_BROKER_URL."""

    help = "Submit what Samphire's outbox holds, until SIGTERM or Ctrl-C."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The database, if it is not the default one."""
        parser.add_argument("--database", help="The database that has the outbox.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Relay until a signal comes."""
        with Client() as client:
            relay = Relay(Rows(options["database"]), client)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: relay.stop())
            self.stdout.write(f"relaying to {client!r}")
            self.stdout.flush()
            relay.run()
