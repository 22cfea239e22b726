"""A part of a stand: killed, stopped or continued, with the proof that it was; and waits for what is to come true."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psutil

from samphire_broker.embedded.process import Part, PartSpec

T = TypeVar("T")

LOOK_S = 0.01


class NothingUnderWayError(Exception):
    """A fault would have met nobody: it is no trial."""


def running(part: Part) -> asyncio.subprocess.Process:
    """The part's process."""
    assert part.process is not None
    return part.process


async def sent(part: Part, number: signal.Signals) -> int:
    """Send a signal that ends the part, and return its exit status."""
    process = running(part)
    assert process.returncode is None, f"{part.spec.name} had ended before"
    process.send_signal(number)
    return await process.wait()


async def killed(part: Part) -> None:
    """kill -9; the exit status proves it."""
    status = await sent(part, signal.SIGKILL)
    assert status == -signal.SIGKILL, f"{part.spec.name} ended with {status}, not by SIGKILL"


async def stopped(part: Part) -> None:
    """SIGSTOP; the process state proves it."""
    running(part).send_signal(signal.SIGSTOP)
    await until(lambda: is_stopped(part), 5, f"{part.spec.name} to stand still")


def is_stopped(part: Part) -> bool:
    """Whether the part stands still."""
    return psutil.Process(part.pid).status() == psutil.STATUS_STOPPED


async def continued(part: Part) -> None:
    """SIGCONT to what has stood still until now."""
    assert is_stopped(part), f"{part.spec.name} did not stand still"
    running(part).send_signal(signal.SIGCONT)
    await until(lambda: not is_stopped(part), 5, f"{part.spec.name} to go on")


async def until(check: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it does not come true.
    """
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
        await asyncio.sleep(LOOK_S)


async def until_async(check: Callable[[], Awaitable[T]], timeout_s: float, what: str) -> T:
    """Wait for a true value and return it.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := await check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
        await asyncio.sleep(LOOK_S)
    return value


def alone(spec: PartSpec, **variables: str) -> PartSpec:
    """The part without the SAMPHIRE_ variables of whoever runs this, with `variables` instead."""
    unset = [word for name in os.environ if name.startswith("SAMPHIRE_") for word in ("-u", name)]
    values = [f"{name}={value}" for name, value in {**spec.env, **variables}.items()]
    return dataclasses.replace(spec, command=["env", *unset, *values, *spec.command], env={})
