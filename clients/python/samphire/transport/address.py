"""Where the broker is: one URL, parsed once, and what each library needs of it.

    redis://[user:password@]host[:port][/database]        valkey:// is the same
    rediss://…                                            with TLS; valkeys:// is the same
    unix://[user:password@]/path/to/socket[?db=database]  redis+socket:// is the same

Options stand behind a `?`: `db`, `virtual_host` (Celery's name for it), `username`, `password`, and with TLS
`ssl_cert_reqs` (`required`, the default, `optional` or `none`, or `CERT_REQUIRED` and so on), `ssl_ca_certs`,
`ssl_certfile`, `ssl_keyfile` (paths) and `ssl_check_hostname`. Anything else is refused.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from samphire.errors import InvalidInputError
from samphire.wire.keys import DEFAULT_NAMESPACE, Keys

DEFAULT_BROKER_URL = "redis://localhost:6379/0"
DEFAULT_PORT = 6379
HIDDEN = "***"

_EXPECTED = (
    "expected a broker URL redis://[user:password@]host:port/database (rediss:// with TLS, unix:// for a socket)"
)
_ENCODE = (
    f"{_EXPECTED}; what was given cannot be told apart: percent-encode the odd characters of user and password "
    "(# is %23, / is %2F, : is %3A, ? is %3F, @ is %40)"
)
_SOCKETS = ("unix", "redis+socket")
_PLAIN, _TLS = ("redis", "valkey"), ("rediss", "valkeys")
_CERT_REQS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
_CERT_REQS_NAMES: dict[Any, str] = {number: name for name, number in _CERT_REQS.items()}
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = (*_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_OPTIONS = ("db", "virtual_host", "username", "password")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class Address:
    """A broker's address; its text, and its repr, are without the password."""

    host: str = "localhost"
    port: int = DEFAULT_PORT
    path: str = ""
    """Of a socket; then host and port do not count."""
    database: int = 0
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    tls: tuple[tuple[str, Any], ...] | None = None
    """redis-py's options, if TLS is used."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            InvalidInputError: it is none of a broker, or has an option that is not known. The password is not shown.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InvalidInputError(_ENCODE) from None
        if parts.fragment or "@" in parts.path + parts.query.partition("password=")[0]:
            raise InvalidInputError(_ENCODE)
        if parts.scheme not in (*_PLAIN, *_TLS, *_SOCKETS):
            raise InvalidInputError(f"{_EXPECTED}, given {_without_user(parts)!r}")
        if port == 0:
            raise InvalidInputError(f"{_EXPECTED}, given port 0")
        options = _options(parts.query, with_tls=parts.scheme in _TLS)
        is_socket = parts.scheme in _SOCKETS
        if is_socket and (parts.hostname or not parts.path.strip("/")):
            raise InvalidInputError(f"{_EXPECTED}; expected unix:///path/to/socket, given {_without_user(parts)!r}")
        return cls(
            host=parts.hostname or "localhost",
            port=port or DEFAULT_PORT,
            path=unquote(parts.path) if is_socket else "",
            database=_database("" if is_socket else parts.path, options),
            username=options.get("username", unquote(parts.username or "")),
            password=options.get("password", unquote(parts.password or "")),
            tls=_tls(options) if parts.scheme in _TLS else None,
        )

    def __str__(self) -> str:
        return self._url(("unix" if self.path else "redis" if self.tls is None else "rediss"), HIDDEN)

    @property
    def connection_options(self) -> dict[str, Any]:
        """What redis-py's connections and clients take, sync and async alike."""
        options: dict[str, Any] = {"db": self.database, "username": self.username or None}
        options["password"] = self.password or None
        if self.path:
            return {**options, "path": self.path}
        options |= {"host": self.host, "port": self.port}
        return options | dict(self.tls or ())

    @property
    def url(self) -> str:
        """The whole URL, with the password."""
        scheme = "unix" if self.path else "redis" if self.tls is None else "rediss"
        options = dict(self.tls or ())
        if options:
            options["ssl_cert_reqs"] = _CERT_REQS_NAMES[options["ssl_cert_reqs"]]
        url = self._url(scheme, quote(self.password, safe=""))
        return f"{url}?{urlencode(options)}" if options else url

    @property
    def celery_url(self) -> str:
        """The same for Celery's broker and its result backend; TLS is no part of it (`celery_ssl`)."""
        return self._url("redis+socket" if self.path else "redis", quote(self.password, safe=""))

    @property
    def celery_ssl(self) -> dict[str, Any] | None:
        """`broker_use_ssl` and `redis_backend_use_ssl`."""
        return None if self.tls is None else dict(self.tls)

    def _url(self, scheme: str, password: str) -> str:
        user = quote(self.username, safe="")
        if self.password:
            user += f":{password}"
        user += "@" if user else ""
        if self.path:
            name = "virtual_host" if scheme == "redis+socket" else "db"
            return f"{scheme}://{user}{quote(self.path)}?{name}={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{user}{host}:{self.port}/{self.database}"


@dataclass(frozen=True)
class Broker:
    """The broker as one deployment uses it: where it is, and what its keys are called."""

    address: Address
    keys: Keys


def broker_of(url: str | None, namespace: str | None = None, celery_key_prefix: str | None = None) -> Broker:
    """The broker that a client names; what is None is as the environment says, or by default.

    Raises:
        InvalidInputError: something of it is malformed.
    """
    address = Address.parse(url or os.environ.get("SAMPHIRE_BROKER_URL") or DEFAULT_BROKER_URL)
    own = namespace or os.environ.get("SAMPHIRE_NAMESPACE") or DEFAULT_NAMESPACE
    prefix = os.environ.get("SAMPHIRE_CELERY_KEY_PREFIX", "") if celery_key_prefix is None else celery_key_prefix
    return Broker(address, Keys(own, prefix, address.database))


def environment_of(broker: Broker) -> dict[str, str]:
    """The environment variables by which another process finds the same."""
    return {
        "SAMPHIRE_BROKER_URL": broker.address.url,
        "SAMPHIRE_NAMESPACE": broker.keys.namespace,
        "SAMPHIRE_CELERY_KEY_PREFIX": broker.keys.celery_prefix,
    }


def redact(url: str) -> str:
    """A URL for messages and logs, without its password; of what is no broker's, only how it begins."""
    try:
        return str(Address.parse(url))
    except InvalidInputError:
        scheme, separator, _ = url.partition("://")
        is_known = separator and scheme in (*_PLAIN, *_TLS, *_SOCKETS)
        return f"{scheme}://{HIDDEN}" if is_known else HIDDEN


def _without_user(parts: SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _options(query: str, *, with_tls: bool) -> dict[str, str]:
    known = (*_OPTIONS, *_TLS_OPTIONS) if with_tls else _OPTIONS
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise InvalidInputError(_ENCODE) from None
    for name in options:
        if name in _TLS_OPTIONS and not with_tls:
            raise InvalidInputError(f"the broker URL has {name}, and no TLS: expected rediss://")
        if name not in known:
            raise InvalidInputError(f"the broker URL has an option that is not known: expected {', '.join(known)}")
    return options


def _shown(value: str) -> str:
    """A value for an error; not where a password may stand in it, behind a wrong separator."""
    return repr(value[:200]) if re.fullmatch(r"[\w./ -]*", value) else "something else"


def _database(path: str, options: dict[str, str]) -> int:
    named = options.get("db", options.get("virtual_host", path)).strip("/") or "0"
    if not (named.isascii() and named.isdecimal()):
        raise InvalidInputError(f"{_EXPECTED}; expected the number of a database, given {_shown(named)}")
    return int(named)


def _tls(options: dict[str, str]) -> tuple[tuple[str, Any], ...]:
    reqs = options.get("ssl_cert_reqs", "required")
    required = _CERT_REQS.get(reqs.removeprefix("CERT_").lower())
    if required is None:
        raise InvalidInputError(
            f"expected ssl_cert_reqs of the broker URL as required, optional or none, given {_shown(reqs)}"
        )
    checked = options.get("ssl_check_hostname", "true" if required == ssl.CERT_REQUIRED else "false").lower()
    if checked not in (*_TRUE, *_FALSE):
        raise InvalidInputError(
            f"expected ssl_check_hostname of the broker URL as true or false, given {_shown(checked)}"
        )
    for name in _FILES:
        if name in options and not Path(options[name]).is_file():
            raise InvalidInputError(f"expected a file as {name} of the broker URL, given {_shown(options[name])}")
    files = [(name, options[name]) for name in _FILES if name in options]
    return ("ssl_cert_reqs", required), ("ssl_check_hostname", checked in _TRUE), *files
