"""`samphire submit | watch | result | cancel | queues`: tasks from the terminal."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import click
import numpy as np

from samphire import Client, SamphireError, Task, TaskEvent, UnknownTaskError
from samphire.client.results import TERMINAL
from samphire.transport.address import broker_of
from samphire_broker.commands.output import (
    FAILED,
    NO_ANSWER,
    fail,
    print_json,
    print_result,
    say,
    with_broker_url,
    with_client,
)
from samphire_broker.commands.waiting import WHY_S, told_why
from samphire_broker.inspection.overview import overview
from samphire_broker.shown import shown, shown_lines

READ_S = 5.0
"""A result that is there is read within so long."""


def _parse_pairs(pairs: tuple[str, ...], what: str) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"expected NAME=VALUE, given {pair!r}", param_hint=what)
        parsed[name] = value
    return parsed


def _read_inputs(file: IO[bytes] | None, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Inputs by name: arrays from .npy and .npz files, anything else as JSON values."""
    inputs: dict[str, Any] = {}
    if file is not None:
        try:
            if file.name.endswith(".npz"):
                with np.load(file, allow_pickle=False) as arrays:
                    inputs.update(arrays)
            else:
                inputs.update(json.load(file))
        except (ValueError, TypeError, OSError, BadZipFile) as error:
            message = f"expected a JSON object of input names to values, or an .npz file: {error}"
            raise click.BadParameter(message, param_hint="--inputs") from error
    for name, text in _parse_pairs(pairs, "--input").items():
        try:
            inputs[name] = np.load(text[1:], allow_pickle=False) if text.startswith("@") else json.loads(text)
        except (ValueError, OSError, BadZipFile) as error:
            message = f"expected {name}=JSON or {name}=@file.npy: {error}"
            raise click.BadParameter(message, param_hint="--input") from error
    if not inputs:
        raise click.UsageError("expected --input NAME=VALUE or --inputs FILE")
    return inputs


def _parameter(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


@click.command()
@click.argument("model")
@click.option("--input", "pairs", multiple=True, metavar="NAME=VALUE", help="JSON values, or @file.npy; repeatable.")
@click.option("--inputs", "file", type=click.File("rb"), help="JSON object of names to values, or .npz; - for stdin.")
@click.option("--version", default="champion", show_default=True, help="Version number, or an alias.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), default="normal", show_default=True)
@click.option("--output", "outputs", multiple=True, help="Name of an output to return; repeatable, all by default.")
@click.option("--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="For the model; repeatable.")
@click.option("--delay-s", type=float, help="Not before so many seconds from now.")
@click.option("--deadline-s", type=float, help="Of use for so many seconds from now.")
@click.option("--max-attempts", type=int, help="Most attempts; by default what is set for the model.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout-s", type=float, help="With --wait: how long; for ever by default.")
@with_client
def submit(
    client: Client,
    *,
    model: str,
    pairs: tuple[str, ...],
    file: IO[bytes] | None,
    version: str,
    priority: Any,
    outputs: tuple[str, ...],
    parameters: tuple[str, ...],
    delay_s: float | None,
    deadline_s: float | None,
    max_attempts: int | None,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Queue one inference of MODEL; prints the task's id, or with --wait its result.

    samphire submit identity --input 'input_fp32=[[1, 2]]' --wait
    """
    inputs = _read_inputs(file, pairs)
    task = client.submit(
        model,
        inputs,
        version=version,
        priority=priority,
        outputs=outputs,
        parameters={name: _parameter(text) for name, text in _parse_pairs(parameters, "--parameter").items()},
        delay_s=delay_s,
        deadline_s=deadline_s,
        max_attempts=max_attempts,
    )
    if wait:
        say(f"task {task.id} is queued")
        with told_why(task, after_s=WHY_S):
            answer = task.result(timeout_s)
        print_result(answer, as_json=as_json)
    elif as_json:
        print_json({"id": task.id})
    else:
        click.echo(task.id)


@click.command()
@click.argument("task_id")
@click.option("--stream", is_flag=True, help="Print the outputs of a model that streams, as they come.")
@click.option("--after", metavar="POSITION", help="Go on after this position, as --json prints it.")
@with_client
def watch(client: Client, *, task_id: str, stream: bool, after: str | None, as_json: bool) -> None:
    """Print what happens to a task, until it has ended; fails unless it succeeded.

    Without --stream each state is printed as it is reached, and how far the task is, if its model tells that. While it
    waits, why is said too.
    """
    task, told = client.task(task_id), ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with told_why(task):
        for event in task.events(after):
            told = event.status
            if as_json:
                print_json(_event_as_dict(event))
            elif stream and event.kind == "output":
                _print_output(event, decoder)
            elif event.kind == "gap":
                say(shown(f"(events are missing before {event.earliest or 'now'})"))
            elif not stream and event.kind != "output":
                click.echo(shown(_described(event)))
    if stream and not as_json:
        click.echo()
    if told != "succeeded":
        why = _why(task)
        if as_json:
            print_json({"id": task_id, "kind": "error", "status": told, "error": why})
        fail(why)


def _described(event: TaskEvent) -> str:
    if event.kind == "progress":
        parts = [f"{event.fraction:.0%}"] if event.fraction is not None else []
        return " ".join(["running", *parts, event.message])
    return f"{event.status} ({event.message})" if event.message else event.status


def _event_as_dict(event: TaskEvent) -> dict[str, Any]:
    """What is known of an event; byte strings as text."""
    known = {
        name: value
        for name, value in vars(event).items()
        if name != "outputs" and value not in (None, "") and value is not False
    }
    known["id"] = known.pop("task_id")
    if event.outputs:
        known["outputs"] = {name: _values(array) for name, array in event.outputs.items()}
    return known


def _values(array: Any) -> Any:
    if array.dtype != object:
        return array.tolist()
    return [element.decode(errors="replace") for element in array.ravel()]


def _print_output(event: TaskEvent, decoder: codecs.IncrementalDecoder) -> None:
    """An output in the terminal: the text of one that is a text, and else its numbers."""
    texts = [array for array in event.outputs.values() if array.dtype == object]
    if texts:
        text = "".join(decoder.decode(piece) for array in texts for piece in array.ravel())
        click.echo(shown_lines(text), nl=False)  # a character may be in two pieces
    else:
        click.echo(shown(" ".join(f"{name}={array.tolist()}" for name, array in event.outputs.items())))


def _why(task: Task) -> str:
    try:
        task.result(timeout_s=5)
    except SamphireError as error:
        return f"{type(error).__name__}: {error}"
    return "the task was run again and succeeded"


@click.command()
@click.argument("task_id")
@click.option("--timeout-s", type=float, default=0.0, show_default=True, help="How long to wait for it.")
@click.option("--delete", is_flag=True, help="Delete the result once it is printed.")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the arrays to this .npz file.")
@with_client
def result(client: Client, *, task_id: str, timeout_s: float, delete: bool, save: Path | None, as_json: bool) -> None:
    """Print the result of a task."""
    task = client.task(task_id)
    if timeout_s <= 0 and (detail := task.status(detail=True)).status not in TERMINAL:
        progress = task.progress() if detail.status == "running" else None
        far = f", {_described(progress).removeprefix('running ')}" if progress is not None else ""
        if detail.is_known is False:
            raise UnknownTaskError(f"task {task_id}: {detail.why}")
        why = f" ({detail.why})" if detail.why else ""
        fail(shown(f"task {task_id} is {detail.status}{far}{why}: --timeout-s waits for it"), NO_ANSWER)
    with told_why(task) if timeout_s > 0 else contextlib.nullcontext():
        answer = task.result(timeout_s if timeout_s > 0 else READ_S)
    if save is not None:
        arrays = {name: _for_npz(name, array) for name, array in answer.outputs.items()}
        with save.open("wb") as target:
            np.savez(target, **arrays)
        say(shown(f"saved {', '.join(answer.outputs)} to {save}"))
    print_result(answer, as_json=as_json)
    if delete:  # once nothing can go wrong with what it was printed to
        sys.stdout.flush()
        task.result(READ_S, delete=True)


def _for_npz(name: str, array: Any) -> Any:
    if array.dtype != object:
        return array
    if any(element.endswith(b"\0") for element in array.ravel()):
        fail(f"output {name!r} has byte strings that end with zero bytes, which an .npz file drops: use --json")
    return array.astype("S")


@click.command()
@click.argument("task_ids", nargs=-1, required=True)
@click.option("--timeout-s", type=float, default=5.0, show_default=True, help="How long to wait for a worker.")
@with_client
def cancel(client: Client, *, task_ids: tuple[str, ...], timeout_s: float, as_json: bool) -> None:
    """End tasks, queued, scheduled or running; fails if one of them has ended, or is unknown."""
    all_cancelled = True
    for task_id in task_ids:
        task = client.task(task_id)
        cancelled = task.cancel(timeout_s)
        status = task.status()
        all_cancelled &= cancelled
        if as_json:
            print_json({"id": task_id, "cancelled": cancelled, "status": status})
        else:
            click.echo(shown(f"{task_id}: {'cancelled' if cancelled else f'not cancelled, it is {status}'}"))
    if not all_cancelled:
        raise click.exceptions.Exit(FAILED)


@click.command()
@with_broker_url
def queues(broker_url: str | None, as_json: bool) -> None:
    """Show what waits where and why, and who works."""
    seen = overview(broker_of(broker_url))
    if as_json:
        print_json(seen.as_dict())
        return
    width = max([len(shown(queue.name)) for queue in seen.queues] + [5])
    click.echo(f"{'queue':<{width}}  {'high':>8}{'normal':>8}{'low':>8}{'lowest':>8}")
    for queue in seen.queues:
        counts = "".join(f"{count:>8}" for count in queue.waiting)
        click.echo(shown(f"{queue.name:<{width}}  {counts}{f'  {queue.why}' if queue.why else ''}"))
    click.echo(f"scheduled {seen.scheduled}, dead letters {seen.dead_letters}")
    for endpoint in seen.endpoints:
        trouble = f", {endpoint.trouble}" if endpoint.trouble else ""
        click.echo(shown(f"webhook endpoint {endpoint.name}: {endpoint.waiting} waiting{trouble}"))
    for worker in seen.workers:
        lease = "" if worker.alive else " (lost: its tasks are about to return)"
        click.echo(shown(f"worker {worker.hostname or worker.id}: {worker.in_flight} in flight{lease}"))
    if not seen.workers:
        say("no worker serves these queues: start one with `celery -A samphire_workers.app worker`")
