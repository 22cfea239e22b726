"""One attempt: whatever a receiver, a name server or a certificate does is an answer; nothing else is dialled."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from samphire.webhooks.targets import REFUSED_ADDRESS, TargetPolicy
from samphire_workers.webhooks.sending import KEPT_BYTES, Answer, CheckedResolver, Sender
from tests.support.dns import name_server
from tests.support.lane import in_a_loop
from tests.support.receiver import Received, Receiver, never, ok, raw, receiver, status

BODY = b'{"type":"test","data":{}}'


def policy(*ports: int, private: bool = True) -> TargetPolicy:
    return TargetPolicy(("http", "https"), (*ports, 443), private)


@contextlib.asynccontextmanager
async def a_sender(
    to: Receiver, *, timeout_s: float = 5.0, private: bool = True, nameservers: tuple[str, ...] = ()
) -> AsyncGenerator[Sender]:
    """Closed whatever fails: its resolver would otherwise call back into a loop that is closed."""
    sender = Sender(policy(to.port, private=private), nameservers, timeout_s)
    try:
        yield sender
    finally:
        await sender.close()


async def send(to: Receiver, url: str = "", **settings: Any) -> Answer:
    async with a_sender(to, **settings) as sender:
        return await sender.send(url or to.url, {"webhook-id": "m"}, BODY)


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
@in_a_loop
async def test_2xx_is_an_arrival(code: int) -> None:
    """With what the answer begins with."""
    async with receiver(status(code, body=b"" if code == 204 else b"thanks")) as to:
        answer = await send(to)
        assert answer.arrived and answer.status == code and answer.beginning == ("" if code == 204 else "thanks")
        assert to.got[0].body == BODY


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308, 400, 401, 404, 410, 429, 500, 503])
@in_a_loop
async def test_anything_else_is_a_failure(code: int) -> None:
    """A redirect too, without a second request, wherever it leads."""
    async with receiver() as other, receiver(status(code, f"location: {other.url}", "set-cookie: a=b")) as to:
        answer = await send(to)
        assert not answer.arrived and answer.status == code and str(code) in answer.error
        assert len(to.got) == 1 and not other.connections
        assert "cookie" not in (await _second(to)).headers


async def _second(to: Receiver) -> Received:
    async with a_sender(to) as sender:
        await sender.send(to.url, {}, BODY)
        await sender.send(to.url, {}, BODY)
    return to.got[-1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("1e9", None),
        ("٣", None),
    ],
)
@in_a_loop
async def test_retry_after(value: str, expected: float | None) -> None:
    """In seconds or as a date; whatever else it is counts for nothing."""
    async with receiver(raw(f"HTTP/1.1 429 X\r\nretry-after: {value}\r\ncontent-length: 0\r\n\r\n".encode())) as to:
        assert (await send(to)).retry_after_s == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff" * 100,
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"220 smtp.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: " + b"b" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: nonsense\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
@in_a_loop
async def test_garbage_is_a_failure(data: bytes) -> None:
    """And nothing of the URL stands in what is said of it."""
    async with receiver(raw(data)) as to:
        answer = await send(to)
        assert not answer.arrived and answer.error
        assert "token" not in answer.error


@in_a_loop
async def test_a_broken_body_counts_with_its_status() -> None:
    """It is the status that says whether the receiver has it."""
    async with receiver(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort")) as to:
        answer = await send(to)
        assert answer.arrived and answer.status == 200


@in_a_loop
async def test_of_an_answer_only_the_beginning_is_read() -> None:
    """However large, also compressed: it is not opened, and the connection is closed."""
    bomb = gzip.compress(b"\0" * 50_000_000)

    async def endless(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
        for _ in range(10_000):
            writer.write(b"x" * 65536)
            await writer.drain()

    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n".encode()
    for respond in (endless, raw(head + bomb, close=False)):
        async with receiver(respond) as to:
            answer = await send(to)
            assert answer.arrived and len(answer.beginning.encode()) <= 3 * KEPT_BYTES


@in_a_loop
async def test_a_slow_receiver_has_its_time_and_no_more() -> None:
    """One that never answers, one that sends a byte at a time, in its headers or after them."""

    async def trickle(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.2)

    async def slow_body(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.2)

    for respond in (never, trickle):
        async with receiver(respond) as to:
            answer = await send(to, timeout_s=0.5)
            assert answer.status is None and answer.error == "no answer in 0.5 s"
    async with receiver(slow_body) as to:
        assert (await send(to)).arrived


@in_a_loop
async def test_a_connection_that_its_receiver_has_closed_costs_nothing() -> None:
    """A receiver that closes after each answer without saying so: each arrives once, and the wait is short."""

    async def closes(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        await ok(to, received, writer)
        await writer.drain()
        writer.close()

    async with receiver(closes) as to, a_sender(to) as sender:
        for number in range(300):
            answer = await sender.send(to.url, {"webhook-id": str(number)}, BODY)
            assert answer.arrived, answer
        assert len({received.headers["webhook-id"] for received in to.got}) == 300


@in_a_loop
async def test_a_broken_connection_is_repeated_once_only_where_it_was_reused() -> None:
    """A fresh one that breaks is the receiver's failure; a kept one that breaks is repeated at once, on a fresh one."""
    answers = [ok, raw(b""), ok]

    async def respond(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        await answers.pop(0)(to, received, writer)

    async with receiver(respond) as to, a_sender(to) as sender:
        assert (await sender.send(to.url, {"webhook-id": "a"}, BODY)).arrived
        assert (await sender.send(to.url, {"webhook-id": "b"}, BODY)).arrived
        assert [received.id for received in to.got] == ["a", "b", "b"] and to.connections == 2
    async with receiver(raw(b"")) as to:
        answer = await send(to)
        assert answer.error == "the connection was closed without an answer" and len(to.got) == 1


@in_a_loop
async def test_nobody_listens() -> None:
    """It says so, without a part of the URL but the host's."""
    async with receiver() as to:
        pass
    answer = await send(to)
    assert answer.status is None and answer.error.startswith("no connection: ") and "token" not in answer.error


@in_a_loop
async def test_a_private_address_is_never_dialled() -> None:
    """Given as a name's, as the URL's own, or beside a public one: no packet, and one text."""
    async with receiver() as to, name_server(lambda name: ["127.0.0.1", "169.254.169.254", "::1"]) as (server, asked):
        named = f"http://inner.example:{to.port}/"
        answers = [await send(to, url, private=False, nameservers=(server,)) for url in (named, to.url)]
        assert {answer.error for answer in answers} == {REFUSED_ADDRESS}
        assert not to.connections and set(asked) == {"inner.example"}


@in_a_loop
async def test_of_several_addresses_only_public_ones_are_used() -> None:
    """[public, private]: the private one is not dialled, although somebody listens there."""
    async with receiver() as to, name_server(lambda name: ["1.1.1.1", "127.0.0.1"]) as (server, _):
        resolver = CheckedResolver(policy(to.port, private=False), (server,))
        found = await resolver.resolve("mixed.example", to.port)
        await resolver.close()
        assert {node["host"] for node in found} == {"1.1.1.1"}
    async with receiver() as to, name_server(lambda name: ["192.0.2.1", "127.0.0.1"]) as (server, _):
        answer = await send(to, f"http://mixed.example:{to.port}/", private=False, nameservers=(server,))
        assert answer.error == REFUSED_ADDRESS and not to.connections  # 192.0.2.1 is for documentation


@in_a_loop
async def test_a_name_that_changes_is_dialled_where_it_was_checked() -> None:
    """Rebinding: what was checked is what is used, and each look-up is checked."""
    said = iter([["127.0.0.1"]])

    def answers(name: str) -> list[str]:
        return next(said, ["169.254.169.254"])

    async with receiver() as to, name_server(answers) as (server, _):
        url = f"http://moves.example:{to.port}/"
        first = await send(to, url, nameservers=(server,))
        assert first.arrived or first.error == REFUSED_ADDRESS  # A and AAAA are two questions
        assert (await send(to, url, nameservers=(server,))).error == REFUSED_ADDRESS
        assert len(to.got) == int(first.arrived)


@in_a_loop
async def test_a_name_that_is_not_found_or_not_answered() -> None:
    """The receiver's failure; and one that hangs holds up nobody, however many wait for it."""

    def answers(name: str) -> list[str] | None:
        return None if name == "hangs.example" else ["127.0.0.1"] if name == "good.example" else []

    async with receiver() as to, name_server(answers) as (server, _):
        hangs = f"http://hangs.example:{to.port}/"
        async with a_sender(to, timeout_s=60.0, nameservers=(server,)) as sender:
            hanging = [asyncio.create_task(sender.send(hangs, {}, BODY)) for _ in range(100)]
            for _ in range(20):
                assert (await sender.send(f"http://good.example:{to.port}/", {}, BODY)).arrived
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
        assert (await send(to, hangs, timeout_s=1.0, nameservers=(server,))).error == "no answer in 1 s"
        missing = await send(to, f"http://nowhere.example:{to.port}/", nameservers=(server,))
        assert missing.error.startswith("the name is not found")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-addext", f"subjectAltName=DNS:{name}"], check=True, capture_output=True)
    return cert, key


def test_tls_goes_by_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of another name, or of nobody known, is a failure; one of the name is good."""
    cert, key = certificate(tmp_path, "good.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def test() -> list[Any]:
        async with receiver(ssl=context) as to, name_server(lambda name: ["127.0.0.1"]) as (server, _):
            found = []
            for name in ("good.example", "other.example"):
                found.append(await send(to, f"https://{name}:{to.port}/", nameservers=(server,)))
            return found

    unknown, _ = asyncio.run(test())
    assert "its certificate is not trusted" in unknown.error
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    import aiohttp.connector

    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", ssl.create_default_context())
    good, other = asyncio.run(test())
    assert good.arrived, good
    assert "its certificate is not trusted" in other.error and other.status is None


@in_a_loop
async def test_no_proxy_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a password from a .netrc."""
    async with receiver() as proxy, receiver() as to:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await send(to)).arrived
        assert not proxy.connections and "authorization" not in to.got[0].headers
