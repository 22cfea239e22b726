"""`samphire webhooks`: endpoints, deliveries, and sending them again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from samphire import InvalidInputError
from samphire_broker.commands.dead_letters import FORMATS, Moment
from samphire_broker.commands.output import FAILED, print_json, say, with_broker_url
from samphire_broker.settings import read_settings
from samphire_broker.shown import shown
from samphire_broker.webhooks.deliveries import Deliveries, DeliveryState
from samphire_broker.webhooks.endpoint import (
    CONCURRENCY_MAX,
    EVENTS,
    RESULT_BYTES_MAX,
    Endpoint,
    check_schedule,
    failing_text,
)
from samphire_broker.webhooks.registry import GRACE_S, SIGNATURES, EndpointState, Registry, Shown, open_registry


def with_registry(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the registry, and `--json`."""

    @with_broker_url
    @functools.wraps(command)
    def run(broker_url: str | None, **kwargs: Any) -> None:
        settings = read_settings() if broker_url is None else read_settings(broker_url=broker_url)
        with open_registry(settings) as registry:
            command(registry, **kwargs)

    return run


def with_deliveries(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the deliveries, and `--json`."""

    @with_registry
    @functools.wraps(command)
    def run(registry: Registry, **kwargs: Any) -> None:
        command(Deliveries(registry), **kwargs)

    return run


@click.group()
def webhooks() -> None:
    """Endpoints of webhooks, and what became of deliveries. For operators: it writes what producers may not."""


@webhooks.group()
def endpoints() -> None:
    """Who is told of tasks: `submit(…, webhook=NAME)`."""


@endpoints.command("add")
@click.argument("name")
@click.argument("url")
@click.option("--tenant", default="", help="Only tasks of this tenant may name it.")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice(EVENTS),
    default=("terminal",),
    show_default=True,
    help="What it is told of; again for more.",
)
@click.option("--signature", type=click.Choice(list(SIGNATURES)), default="v1", show_default=True)
@click.option(
    "--result-bytes",
    type=click.IntRange(0, RESULT_BYTES_MAX),
    default=0,
    help="Results of at most so many bytes go along.",
)
@click.option("--cloud-events", is_flag=True, help="Send CloudEvents (binary mode) as well.")
@click.option("--ordered", is_flag=True, help="Events of one task one after the other.")
@click.option("--rate-per-s", type=click.FloatRange(0), default=0.0, help="Most deliveries a second; 0: no limit.")
@click.option(
    "--concurrency",
    type=click.IntRange(0, CONCURRENCY_MAX),
    default=0,
    help="Most deliveries under way; 0: SAMPHIRE_WEBHOOK_CONCURRENCY.",
)
@click.option("--schedule-s", help="Waits before the attempts, comma-separated; default SAMPHIRE_WEBHOOK_SCHEDULE_S.")
@with_registry
def add(registry: Registry, *, schedule_s: str | None, signature: str, as_json: bool, **options: Any) -> None:
    """Register an endpoint, and show its secret: only this once."""
    schedule = check_schedule(_numbers(schedule_s)) if schedule_s else ()
    made = registry.add(Endpoint(schedule_s=schedule, **options), signature)
    _show(made, options["name"], as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"expected seconds with commas between, given {text[:100]!r}") from error


def _show(made: Shown, name: str, as_json: bool) -> None:
    if as_json:
        print_json({"endpoint": name, "secrets": list(made.secrets)})
        return
    say("give the receiver this; it is not shown again:")
    for secret in made.secrets:
        click.echo(secret)


@endpoints.command("list")
@with_registry
def list_endpoints(registry: Registry, *, as_json: bool) -> None:
    """List endpoints, and how they fare."""
    for state in registry.endpoints():
        if as_json:
            print_json(_fields(state))
            continue
        endpoint = state.endpoint
        what = f"default secret of {endpoint.tenant or 'tasks without a tenant'}" if not endpoint.url else endpoint.url
        told = f"disabled ({endpoint.disabled})" if endpoint.disabled else failing_text(state.health) or "ok"
        click.echo(shown(f"{endpoint.name:<24} {what}  {told}, {state.waiting} waiting"))


def _fields(state: EndpointState) -> dict[str, Any]:
    endpoint = state.endpoint
    names = ("name", "url", "tenant", "events", "result_bytes", "cloud_events", "ordered", "rate_per_s", "concurrency")
    fields = {name: getattr(endpoint, name) for name in (*names, "schedule_s", "disabled", "created_at")}
    secrets = [
        {"version": secret.version, "public_key": secret.public or None, "expires_at": secret.expires_at or None}
        for secret in endpoint.secrets
    ]
    return {**fields, "secrets": secrets, "waiting": state.waiting, "health": state.health}


@endpoints.command("disable")
@click.argument("name")
@with_registry
def disable(registry: Registry, *, name: str, as_json: bool) -> None:
    """Send nothing there; deliveries wait, and are not lost."""
    registry.disable(name)
    _told({"disabled": name}, f"{name} is disabled", as_json)


@endpoints.command("enable")
@click.argument("name")
@with_registry
def enable(registry: Registry, *, name: str, as_json: bool) -> None:
    """Send there again, what waits too."""
    waiting = registry.enable(name)
    _told({"enabled": name, "waiting": waiting}, f"{name} is enabled, {waiting} deliveries go on", as_json)


@endpoints.command("rotate")
@click.argument("name", required=False)
@click.option("--default", "of_default", is_flag=True, help="The tenant's default secret, which signs for URLs.")
@click.option("--tenant", default="", help="Whose default secret.")
@click.option(
    "--grace-s", type=float, default=GRACE_S, show_default=True, help="The old secrets sign as well for so long."
)
@with_registry
def rotate(
    registry: Registry, *, name: str | None, of_default: bool, tenant: str, grace_s: float, as_json: bool
) -> None:
    """Give an endpoint a new secret, or make a default one; it is shown only this once."""
    if bool(name) == of_default:
        raise click.UsageError("expected the name of an endpoint, or --default")
    made = registry.rotate(name, grace_s) if name else registry.rotate_default(tenant, grace_s)
    _show(made, name or f"@{tenant}", as_json)


@endpoints.command("remove")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_registry
def remove(registry: Registry, *, name: str, yes: bool, as_json: bool) -> None:
    """Remove an endpoint; each delivery that waits becomes a dead letter."""
    waiting = registry.state(name).waiting
    if waiting and not yes:
        click.confirm(f"{waiting} deliveries wait and will be dead letters; remove {name}?", abort=True, err=True)
    count = registry.remove(name)
    _told(
        {"removed": name, "dead_letters": count}, f"{name} is removed, {count} deliveries become dead letters", as_json
    )


@webhooks.command()
@click.argument("endpoint")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@with_deliveries
def deliveries(book: Deliveries, *, endpoint: str, limit: int, as_json: bool) -> None:
    """List deliveries to an endpoint with their attempts, the newest first."""
    for state in book.of(endpoint, limit):
        if as_json:
            print_json(state._asdict())
            continue
        click.echo(shown(f"{state.id}  {state.watermark:>6}  {state.state:<9} {state.event:<15} {state.task_id}"))
        for line in _attempts(state):
            click.echo(shown(f"    {line}"))


def _attempts(state: DeliveryState) -> list[str]:
    lines = [_attempt(attempt) for attempt in state.attempts]
    if state.next_at is not None:
        lines.append(f"next attempt at {datetime.fromtimestamp(state.next_at, UTC):%Y-%m-%d %H:%M:%S} UTC")
    return lines


def _attempt(attempt: dict[str, Any]) -> str:
    told = attempt.get("error") or "arrived"
    answer = f"  {str(attempt['answer'])[:80]!r}" if attempt.get("answer") else ""
    return f"{attempt.get('at', '')}  {attempt.get('status') or '-'}  {attempt.get('ms', 0)} ms  {told}{answer}"


@webhooks.command()
@click.argument("delivery_id")
@click.option("--timeout-s", type=float, default=30.0, show_default=True)
@with_deliveries
def redeliver(book: Deliveries, *, delivery_id: str, timeout_s: float, as_json: bool) -> None:
    """Send one delivery again, once, under the same id."""
    _outcome(book.redeliver(delivery_id, timeout_s), as_json)


@webhooks.command()
@click.argument("endpoint")
@click.option("--timeout-s", type=float, default=30.0, show_default=True)
@with_deliveries
def test(book: Deliveries, *, endpoint: str, timeout_s: float, as_json: bool) -> None:
    """Send an endpoint an event of the type `test`, and show its answer."""
    _outcome(book.test(endpoint, timeout_s), as_json)


def _outcome(attempt: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(attempt)
    else:
        click.echo(shown(_attempt(attempt)))
    if attempt.get("error"):
        raise click.exceptions.Exit(FAILED)


@webhooks.command()
@click.argument("endpoint")
@click.option("--since", type=Moment(FORMATS), required=True, help="That failed at this time (UTC) or later.")
@with_deliveries
def recover(book: Deliveries, *, endpoint: str, since: datetime, as_json: bool) -> None:
    """Send again what has failed for good, for a receiver that was down."""
    count = book.recover(endpoint, since.timestamp())
    _told({"recovered": count}, f"{count} deliveries are sent again", as_json)


@webhooks.command("replay-missing")
@click.argument("endpoint")
@click.option("--after", type=click.IntRange(0), required=True, help="The highest watermark that the receiver has.")
@with_deliveries
def replay_missing(book: Deliveries, *, endpoint: str, after: int, as_json: bool) -> None:
    """Send again all that has a higher watermark than the receiver knows, for one that has lost what it had."""
    count = book.replay_missing(endpoint, after)
    _told({"replayed": count}, f"{count} deliveries are sent again", as_json)


def _told(value: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(shown(line))
