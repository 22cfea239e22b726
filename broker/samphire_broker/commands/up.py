"""`samphire up` and `samphire demo`: the embedded stack."""

from __future__ import annotations

import asyncio
import functools
import os
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from samphire.errors import SamphireError
from samphire_broker.commands.output import fail, say
from samphire_broker.settings import read_settings

DATA_DIR = "~/.local/share/samphire"


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


def stack_options(default_ports: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that describe a stack; without `default_ports` every port is a free one."""

    def port(flag: str, number: int, what: str) -> Callable[..., Any]:
        default = number if default_ports else 0
        return click.option(
            flag,
            type=click.IntRange(0, 65535),
            default=default,
            show_default=True,
            help=f"{what}; 0: a free one.",
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [
            port("--broker-port", 6379, "Port of the broker"),
            port("--triton-grpc-port", 8001, "Port of Triton's gRPC endpoint"),
            port("--triton-http-port", 8000, "Port of Triton's HTTP endpoint"),
            port("--triton-metrics-port", 8002, "Port of Triton's metrics"),
            port("--flower-port", 5555, "Port of Flower"),
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
                help="Models to serve instead of those that ship; copied, never written to.",
            ),
            click.option(
                "--ready-file",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Write addresses and process ids here, as JSON, once all is ready.",
            ),
        ]
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return decorate


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
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing: pip install 'samphire[embedded]'")
    try:
        read_settings()  # the workers' would be refused by them, one after the other
    except SamphireError as error:
        fail(str(error))
    stack_options = StackOptions(
        data_dir=data_dir.expanduser().resolve(),
        external_broker_url=os.environ.get("SAMPHIRE_BROKER_URL") or None,
        external_triton_urls=os.environ.get("SAMPHIRE_TRITON_URLS") or None,
        loopback_webhooks=job is not None,  # the demo receives one
        **options,
    )
    try:
        asyncio.run(run_stack(stack_options, say, job or serve))
    except (PartError, PortTakenError, SamphireError) as error:
        fail(str(error))


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DATA_DIR,
    show_default=True,
    envvar="SAMPHIRE_DATA_DIR",
    help="Queues, models and logs; survives restarts.",
)
@stack_options(default_ports=True)
def up(data_dir: Path, **options: Any) -> None:
    """Run the whole stack on this machine until Ctrl-C.

    SAMPHIRE_BROKER_URL and SAMPHIRE_TRITON_URLS each replace their part.
    """
    _run_stack(data_dir, options)


@click.command()
@click.option("--keep", is_flag=True, help="Leave the stack running until Ctrl-C, to try things out.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep queues, models and logs here; by default a folder that is removed at the end.",
)
@stack_options(default_ports=False)
def demo(data_dir: Path | None, keep: bool, **options: Any) -> None:
    """Start a stack, classify real handwritten digits with it, and stop it."""
    try:
        from samphire_broker.demo import show
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing: pip install 'samphire[embedded]'")
    job = functools.partial(show, keep=keep)
    if data_dir is not None:
        _run_stack(data_dir, options, job)
        return
    with tempfile.TemporaryDirectory(prefix="samphire-demo-") as folder:
        _run_stack(Path(folder), options, job)
