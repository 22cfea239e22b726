"""`samphire dead-letters list | show | redrive | purge`."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from samphire import Client, DeadLetter, LetterFilter
from samphire_broker.commands.output import print_json, say, with_client
from samphire_broker.retry import REASONS
from samphire_broker.shown import shown, shown_lines


class Moment(click.DateTime):
    """A point in time; without an offset it is UTC."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return it with a time zone."""
        moment: datetime = super().convert(value, param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]


def with_filter(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name letters."""

    @click.option("--model", help="Of this model.")
    @click.option("--reason", type=click.Choice(REASONS), help="That failed for this reason.")
    @click.option("--since", type=Moment(FORMATS), help="That failed at this time (UTC) or later.")
    @click.option("--until", type=Moment(FORMATS), help="That failed at this time (UTC) or earlier.")
    @functools.wraps(command)
    def run(
        *args: Any,
        model: str | None,
        reason: str | None,
        since: datetime | None,
        until: datetime | None,
        **kwargs: Any,
    ) -> None:
        command(*args, which=LetterFilter(model, reason, since, until), **kwargs)

    return run


@click.group("dead-letters")
def dead_letters() -> None:
    """Look at what failed for good, send it again, or delete it."""


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@with_filter
@with_client
def list_letters(client: Client, *, which: LetterFilter, limit: int, as_json: bool) -> None:
    """List letters, the newest first."""
    for letter in client.dead_letters.list(which, limit=limit):
        if as_json:
            print_json(_fields(letter))
        else:
            line = f"{letter.id}  {letter.died_at:%Y-%m-%d %H:%M:%S}  {letter.reason:<14} {letter.error[:100]}"
            click.echo(shown(line))


def _fields(letter: DeadLetter) -> dict[str, Any]:
    fields = asdict(letter) | {"died_at": letter.died_at.isoformat()}
    fields["history"] = [asdict(attempt) | {"at": attempt.at.isoformat()} for attempt in letter.history]
    message = fields.pop("message")
    if message is None:
        del fields["history"]  # a list of letters does not tell of it
    return fields if message is None else fields | {"message": message.decode(errors="replace")}


@dead_letters.command("show")
@click.argument("letter_id")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the message as it was sent here.")
@with_client
def show(client: Client, *, letter_id: str, save: Path | None, as_json: bool) -> None:
    """Show one letter with its message."""
    letter = client.dead_letters.get(letter_id)
    if save is not None and letter.message is not None:
        save.write_bytes(letter.message)
        say(f"wrote {len(letter.message)} bytes to {save}")
    if as_json:
        print_json(_fields(letter))
        return
    fields = _fields(letter)
    for attempt in fields.pop("history"):
        click.echo(shown(f"attempt   {attempt['at']}  {attempt['worker']}  {attempt['error']}"))
        if attempt["traceback"]:
            click.echo(textwrap.indent(shown_lines(attempt["traceback"].rstrip()), " " * 10))
    for name, value in fields.items():
        click.echo(shown(f"{name:<9} {value}"))


def _chosen(client: Client, letter_ids: tuple[str, ...], everything: bool, which: LetterFilter) -> list[str]:
    if bool(letter_ids) == (everything or which != LetterFilter()):
        raise click.UsageError("expected letter ids, or a filter (--model, --reason, --since, --until), or --all")
    return list(letter_ids) or [letter.id for letter in client.dead_letters.list(which, limit=None)]


@dead_letters.command("redrive")
@click.argument("letter_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every letter there is.")
@click.option("--rate-per-s", type=float, help="No faster than this.")
@with_filter
@with_client
def redrive(
    client: Client,
    *,
    letter_ids: tuple[str, ...],
    everything: bool,
    rate_per_s: float | None,
    which: LetterFilter,
    as_json: bool,
) -> None:
    """Send messages again as they were; each task keeps its id, and its attempts begin anew."""
    chosen = _chosen(client, letter_ids, everything, which)
    say(f"redriving {len(chosen)} dead letters")
    count = client.dead_letters.redrive(chosen, rate_per_s=rate_per_s)
    _told(count, "redriven", as_json)


@dead_letters.command("purge")
@click.argument("letter_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every letter there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_filter
@with_client
def purge(
    client: Client, *, letter_ids: tuple[str, ...], everything: bool, yes: bool, which: LetterFilter, as_json: bool
) -> None:
    """Delete letters for good, with the messages in them."""
    chosen = _chosen(client, letter_ids, everything, which)
    if chosen and not yes:
        click.confirm(f"delete {len(chosen)} dead letters and their messages for good?", abort=True, err=True)
    _told(client.dead_letters.purge(chosen), "purged", as_json)


def _told(count: int, what: str, as_json: bool) -> None:
    if as_json:
        print_json({what: count})
    else:
        click.echo(f"{count} {what}")
