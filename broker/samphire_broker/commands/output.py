"""What the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from samphire import (
    BrokerMemoryFullError,
    BrokerUnavailableError,
    Client,
    InferResult,
    InvalidInputError,
    ResultTimeoutError,
    SamphireError,
)
from samphire.wire.tensors import array_to_bytes, bytes_to_values
from samphire_broker.shown import shown

FAILED, BROKER_AWAY, NO_ANSWER = 1, 3, 4  # 2 is click's, for wrong usage
SHOWN_VALUES = 12


DATA_DIR = "~/.local/share/samphire"

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DATA_DIR,
    show_default=True,
    envvar="SAMPHIRE_DATA_DIR",
    help="Queues, models and logs of the stack; survives restarts.",
)


def say(line: str) -> None:
    """A line for the person at the terminal."""
    click.echo(line, err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command with an error."""
    say(f"samphire: {shown(message)}")
    sys.exit(code)


def print_json(value: Any) -> None:
    """One value on one line, for scripts."""
    click.echo(json.dumps(value))


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with a message and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ResultTimeoutError as error:
            fail(str(error), NO_ANSWER)
        except BrokerUnavailableError as error:
            fail(f"{error}. `samphire up` starts one; SAMPHIRE_BROKER_URL names another", BROKER_AWAY)
        except BrokerMemoryFullError as error:
            fail(str(error), BROKER_AWAY)
        except SamphireError as error:
            fail(f"{type(error).__name__}: {error}")
        except OSError as error:  # a file that is written or read
            fail(str(error))

    return run


def with_broker_url(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--broker-url` and `--json`, and let it end with a message instead of a traceback."""
    broker_url = click.option(
        "--broker-url", envvar="SAMPHIRE_BROKER_URL", show_envvar=True, help="Default: redis://localhost:6379/0"
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one value a line.")
    return broker_url(as_json(_reports_errors(command)))


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a client, by `--broker-url`, and `--json`."""

    @with_broker_url
    @functools.wraps(command)
    def run(broker_url: str | None, **kwargs: Any) -> None:
        try:
            client = Client(broker_url)
        except InvalidInputError as error:
            raise click.UsageError(str(error)) from error
        with client:
            command(client, **kwargs)

    return run


def print_result(result: InferResult, *, as_json: bool) -> None:
    """An answer: in full as JSON, shortened for people."""
    if as_json:
        outputs = [_tensor(name, array) for name, array in result.outputs.items()]
        fields = {"id": result.task_id, "model_name": result.model_name, "model_version": result.model_version}
        timings = {} if result.timings is None else {"timings": msgspec.to_builtins(result.timings)}
        print_json({**fields, **timings, "outputs": outputs})
        return
    click.echo(shown(f"{result.model_name} version {result.model_version}, task {result.task_id}"))
    for name, array in result.outputs.items():
        values = ", ".join(_text(value) for value in array.ravel()[:SHOWN_VALUES].tolist())
        more = ", …" if array.size > SHOWN_VALUES else ""
        datatype, shape, _ = array_to_bytes(name, array)
        click.echo(shown(f"  {name} {datatype}{shape}: {values}{more}"))
    if result.timings is not None:
        say(shown(str(result.timings)))


def _text(value: Any) -> str:
    """A value for people: byte strings as the text that they hold, in quotes."""
    if isinstance(value, bytes):
        try:
            return repr(value.decode())
        except UnicodeDecodeError:
            return repr(value)
    return str(value)


def _tensor(name: str, array: Any) -> dict[str, Any]:
    """A tensor as the protocol has it in JSON; as hexadecimal bytes where JSON cannot hold its values."""
    datatype, shape, data = array_to_bytes(name, array)
    values = bytes_to_values(name, datatype, shape, data)
    held = {"data": values} if values is not None else {"hex": data.hex()}
    return {"name": name, "datatype": datatype, "shape": shape, **held}
