"""One attempt of a delivery: an HTTP request that goes to a checked address, and is not believed in anything.

A name is looked up by a resolver that gives only addresses that webhooks may go to, and the connection is made to that
very address, TLS by the name; no redirect is followed, no proxy is taken from the environment, no cookie is kept, and
of the answer no more than its beginning is read.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, NamedTuple

import aiodns
import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from samphire.errors import InvalidInputError
from samphire.webhooks.targets import REFUSED_ADDRESS, TargetPolicy, check_url, why_refused

KEPT_BYTES = 512
"""Of an answer so much is read and kept."""
BODY_S = 1.0
"""The answer counts with its status; its beginning is waited for no longer than this."""
DNS_CACHE_S = 10
KEEP_ALIVE_S = 30.0
_DIGITS = re.compile(r"[0-9]{1,10}")


class Answer(NamedTuple):
    """What came of an attempt."""

    status: int | None
    """None: there was no answer."""
    error: str
    """Why it is a failure; "" for a delivery that has arrived. Never has a part of a URL but the host."""
    ms: float
    beginning: str = ""
    retry_after_s: float | None = None

    @property
    def arrived(self) -> bool:
        """Whether the receiver has it."""
        return not self.error


class RefusedAddressError(OSError):
    """A name has no address that webhooks may go to."""


class CheckedResolver(AbstractResolver):
    """Looks names up without a thread, and gives only addresses that may be dialled.

    Args:
        policy: which these are.
        nameservers: who is asked; none: the system's.
    """

    def __init__(self, policy: TargetPolicy, nameservers: tuple[str, ...]) -> None:
        self._policy = policy
        self._dns = aiodns.DNSResolver(nameservers=list(nameservers) or None, timeout=3.0, tries=3)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name.

        Raises:
            RefusedAddressError: it has none that may be dialled.
            OSError: it is not found.
        """
        try:
            found = await self._dns.getaddrinfo(host, port=port, family=family, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            raise OSError(None, f"the name is not found ({error.args[-1]})") from error
        nodes: list[ResolveResult] = []
        for node in found.nodes:
            address = ip_address(node.addr[0].decode() if isinstance(node.addr[0], bytes) else node.addr[0])
            if why_refused(address, allow_private=self._policy.allow_private) is None:
                nodes.append(
                    ResolveResult(
                        hostname=host,
                        host=str(address),
                        port=port,
                        family=node.family,
                        proto=0,
                        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                    )
                )
        if not nodes:
            raise RefusedAddressError(REFUSED_ADDRESS)
        return nodes

    async def close(self) -> None:
        """Ask nothing more."""
        await self._dns.close()


class Sender:
    """Sends webhooks, hundreds at once.

    Args:
        policy: where they may go.
        nameservers: who is asked for names.
        timeout_s: how long an attempt may take in all.
    """

    def __init__(self, policy: TargetPolicy, nameservers: tuple[str, ...], timeout_s: float) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._resolver = CheckedResolver(policy, nameservers)
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = self._make_session(trace, force_close=False)
        self._fresh_session = self._make_session(None, force_close=True)
        """Where what met a connection that its receiver had closed is repeated."""

    def _make_session(self, trace: aiohttp.TraceConfig | None, *, force_close: bool) -> aiohttp.ClientSession:
        # Limits stand before a delivery is taken on: to wait here would count as the receiver's time.
        if force_close:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver, limit=0, ttl_dns_cache=DNS_CACHE_S, force_close=True
            )
        else:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver, limit=0, ttl_dns_cache=DNS_CACHE_S, keepalive_timeout=KEEP_ALIVE_S
            )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            trace_configs=[] if trace is None else [trace],
            skip_auto_headers=("Accept-Encoding",),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
        await self._fresh_session.close()
        await self._resolver.close()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Make one attempt; whatever the receiver does is an answer."""
        began = time.monotonic()
        try:
            check_url(url, self._policy)  # an address in the URL is asked of no resolver
        except InvalidInputError as error:
            return Answer(None, str(error), 0.0)
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._attempt(url, headers, body)
        except TimeoutError:
            found = Answer(None, f"no answer in {self._timeout_s:g} s", 0.0)
        except Exception as error:  # noqa: BLE001 - whatever a receiver makes of it is its answer
            found = Answer(None, reason_of(error), 0.0)
        return found._replace(ms=round((time.monotonic() - began) * 1000, 1))

    async def _attempt(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        reused: dict[str, bool] = {}
        try:
            return await self._post(self._session, url, headers, body, reused)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # It was kept alive here and closed there: the receiver has not begun to answer.
            if not reused or isinstance(error, aiohttp.ClientConnectorError):
                raise
        return await self._post(self._fresh_session, url, headers, body, {})

    async def _post(
        self,
        session: aiohttp.ClientSession,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        reused: dict[str, bool],
    ) -> Answer:
        response = await session.post(
            url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=reused, expect100=False
        )
        try:
            beginning = await _beginning(response)
        finally:
            response.close() if not response.content.at_eof() else response.release()
        return _answer(response.status, response.headers, beginning)


async def _note_reuse(_session: Any, context: Any, _params: Any) -> None:
    reused = getattr(context, "trace_request_ctx", None)
    if isinstance(reused, dict):
        reused["reused"] = True


async def _beginning(response: aiohttp.ClientResponse) -> str:
    data = b""
    try:
        async with asyncio.timeout(BODY_S):
            while len(data) <= KEPT_BYTES:
                some = await response.content.read(KEPT_BYTES + 1 - len(data))
                if not some:
                    break
                data += some
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        pass  # its status is known, which is what counts
    return data[:KEPT_BYTES].decode(errors="replace")


def _answer(status: int, headers: Mapping[str, str], beginning: str) -> Answer:
    if 200 <= status < 300:
        return Answer(status, "", 0.0, beginning)
    what = f"answered {status}"
    if 300 <= status < 400:
        what += ": redirects are not followed, give the URL that it leads to"
    return Answer(status, what, 0.0, beginning, _retry_after(headers.get("Retry-After")))


def _retry_after(value: str | None) -> float | None:
    """Seconds that a receiver asks to be left alone; RFC 9110, 10.2.3."""
    if value is None:
        return None
    if _DIGITS.fullmatch(value):
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def reason_of(error: Exception) -> str:
    """Why an attempt has failed, without a part of its URL, which aiohttp's own texts may have."""
    cause: BaseException = error
    if isinstance(error, aiohttp.ClientConnectorDNSError | aiohttp.ClientConnectorError):
        cause = error.os_error
    if isinstance(cause, RefusedAddressError):
        return REFUSED_ADDRESS
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return str(cause.args[-1]) if cause.args else "the name is not found"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {_tls_reason(error.certificate_error)}"
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(cause, ssl.SSLError):
        return f"TLS has failed: {_tls_reason(cause)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed without an answer"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection: {cause.strerror or type(cause).__name__}"  # type: ignore[attr-defined]
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
        return "the answer is no HTTP"
    return f"the connection broke: {type(error).__name__}"


def _tls_reason(error: object) -> str:
    return str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or type(error).__name__)
