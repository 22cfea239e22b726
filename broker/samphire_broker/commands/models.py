"""`samphire models list | show | reload | remove`: what the endpoints serve."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import msgspec

from samphire import Client, ServedModel, TensorSpec
from samphire_broker.commands.output import FAILED, NO_ANSWER, data_dir_option, fail, print_json, say, with_client
from samphire_broker.repository.record import Record, note_trouble, running_record
from samphire_broker.shown import shown


@click.group()
def models() -> None:
    """Show what the endpoints serve, and load what has changed."""


@models.command("list")
@with_client
def list_models(client: Client, *, as_json: bool) -> None:
    """Show every model with its versions, and why one is not loaded."""
    found = client.models.list()
    if as_json:
        for model in found:
            print_json(_as_dict(model))
        return
    if not found:
        say("no worker has told of any model: start one, or look at `samphire doctor`")
    width = max([len(model.name) for model in found] + [5])
    for model in found:
        click.echo(shown(f"{model.name:<{width}}  {_state(model)}"))


@models.command()
@click.argument("model")
@with_client
def show(client: Client, *, model: str, as_json: bool) -> None:
    """Show what a model takes and returns."""
    found = client.models.get(model)
    if as_json:
        print_json(_as_dict(found))
        return
    click.echo(shown(f"{found.name}  {_state(found)}"))
    if found.signature is None:
        raise click.exceptions.Exit(FAILED)
    signature = found.signature
    rows = ["rows"] if signature.max_batch_size else []
    for what, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs.values():
            click.echo(shown(f"  {what} {spec.name} {_shape(spec, rows)}"))
    if rows:
        click.echo(f"  at most {signature.max_batch_size} rows a request")
    kinds = {
        "streams its outputs": signature.decoupled,
        "requests are joined": signature.dynamic_batching,
        "keeps state between the requests of a sequence": signature.sequence_batching,
    }
    for text, holds in kinds.items():
        if holds:
            click.echo(f"  {text}")


def _shape(spec: TensorSpec, rows: list[str]) -> str:
    dimensions = ", ".join([*rows, *("any" if dimension == -1 else str(dimension) for dimension in spec.shape)])
    return f"{spec.datatype} [{dimensions}]{' (optional)' if spec.optional else ''}"


def _state(model: ServedModel) -> str:
    trouble = f": {model.trouble}" if model.trouble else ""
    if model.signature is None:
        return f"not loaded{trouble or '; its Triton gives no reason, its log may'}"
    versions = ", ".join(model.signature.versions)
    return f"versions {versions}" + (f"; not as its files are{trouble}" if trouble else "")


def _as_dict(model: ServedModel) -> dict[str, Any]:
    signature: Any = None if model.signature is None else msgspec.to_builtins(model.signature)
    return {"name": model.name, "signature": signature, "trouble": model.trouble}


def _with_triton(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the addresses of the Tritons, and the record of the stack on this machine if that is the one."""

    @data_dir_option
    @functools.wraps(command)
    def run(data_dir: Path, **kwargs: Any) -> None:
        folder = data_dir.expanduser().resolve()
        record = running_record(folder)
        urls = [url.strip() for url in os.environ.get("SAMPHIRE_TRITON_URLS", "").split(",") if url.strip()]
        if urls and (record is None or record.triton not in urls):
            command(urls, folder, None, **kwargs)
        elif record is not None:
            command([record.triton], folder, record, **kwargs)
        else:
            fail(
                f"no `samphire up` runs with the data directory {folder}: give its --data-dir, or set "
                "SAMPHIRE_TRITON_URLS to host:port of each Triton's gRPC endpoint"
            )

    return run


@models.command()
@click.argument("names", nargs=-1)
@_with_triton
def reload(urls: list[str], data_dir: Path, record: Record | None, *, names: tuple[str, ...]) -> None:
    """Load models as their files are now: those NAMES, or what has changed. What does not load leaves what is served.

    With `samphire up` the files are those of its --model-repository. With SAMPHIRE_TRITON_URLS each Triton loads from
    its own repository, and has to be told the names.
    """
    if record is not None:
        failed = _run(_reload_mirrored(data_dir, record, names))
    elif not names:
        raise click.UsageError("expected NAMES of models: what has changed in a repository elsewhere is not known here")
    else:
        failed = _run(_everywhere(urls, names, "load_model", "loaded"))
    if failed:
        raise click.exceptions.Exit(FAILED)


@models.command()
@click.argument("names", nargs=-1, required=True)
@_with_triton
def remove(urls: list[str], data_dir: Path, record: Record | None, *, names: tuple[str, ...]) -> None:
    """Unload models; who submits to them then is refused. Files are not deleted."""
    if record is not None:
        folder = Path(record.source)
        if not record.is_own:
            fail(f"the models of {folder} ship with Samphire: serve others with samphire up --model-repository DIR")
        gone = " ".join(str(folder / name) for name in names)
        fail(
            f"what `samphire up` serves is what {folder} has, so that is the place: delete {gone} there, then run "
            "samphire models reload"
        )
    if _run(_everywhere(urls, names, "unload_model", "unloaded")):
        raise click.exceptions.Exit(FAILED)


def _run(work: Coroutine[Any, Any, bool]) -> bool:
    from samphire_broker.repository.folder import ModelFolderError
    from samphire_broker.repository.loads import TritonAwayError

    try:
        return asyncio.run(work)
    except (ModelFolderError, OSError) as error:
        fail(str(error))
    except TritonAwayError as error:
        fail(f"Triton does not answer: {error}", NO_ANSWER)


async def _reload_mirrored(data_dir: Path, record: Record, names: tuple[str, ...]) -> bool:
    """Take over what a folder has; whether something of it failed."""
    from tritonclient.grpc.aio import InferenceServerClient

    from samphire_broker.repository.changes import Changes, reload
    from samphire_broker.repository.loads import Loads
    from samphire_broker.repository.mirror import Mirror

    mirror = Mirror(Path(record.source), data_dir)
    async with InferenceServerClient(record.triton) as client:
        loads = Loads(client, data_dir / "logs" / "triton.log")
        changes = Changes(mirror, loads, lambda line: say(shown(line)), functools.partial(note_trouble, data_dir))
        done = await reload(mirror, changes, names, record.troubles)
    if not done:
        say(f"nothing has changed in {record.source}")
    return any(done.values())


async def _everywhere(urls: list[str], names: tuple[str, ...], method: str, done: str) -> bool:
    """Ask each Triton to load or unload models; whether something of it failed."""
    from tritonclient.grpc.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    from samphire_broker.repository.loads import LOAD_TIMEOUT_S

    failed = False
    for url in urls:
        async with InferenceServerClient(url) as client:
            for name in names:
                try:
                    await getattr(client, method)(name, client_timeout=LOAD_TIMEOUT_S)
                    say(shown(f"model {name} is {done} on {url}"))
                except InferenceServerException as error:
                    failed = True
                    say(shown(f"model {name} is not {done} on {url}: {error.message()}"))
    return failed
