"""Where webhooks may go: which URLs are taken, and which addresses are never dialled.

One table says what an address is, and one function reads a URL; both are used where an endpoint is added, where a task
is submitted, and before each connection. The `is_private` and `is_global` of the standard library let through what
another network translates (RFC 6052), and more, so the table is written out.

Sources: IANA's special-purpose registries of IPv4 and IPv6 (RFC 6890 and its updates); the WHATWG URL standard on hosts
that end in a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from samphire.errors import InvalidInputError

if TYPE_CHECKING:
    from yarl import URL

URL_CHARACTERS = 2048
DEFAULT_SCHEMES = ("https",)
DEFAULT_PORTS = (443, 8443)

Network = IPv4Network | IPv6Network
IPAddress = IPv4Address | IPv6Address


def _networks(*names: str) -> tuple[Network, ...]:
    return tuple(ip_network(name) for name in names)


NEVER: dict[str, tuple[Network, ...]] = {
    "link-local": _networks("169.254.0.0/16", "fe80::/10"),
    "of a cloud's own services": _networks("168.63.129.16/32", "100.100.100.200/32", "fd00:ec2::254/128"),
    "multicast": _networks("224.0.0.0/4", "ff00::/8"),
    "unspecified or of this network": _networks("0.0.0.0/8", "::/128"),
    "reserved": _networks("240.0.0.0/4", "192.0.0.0/24", "192.88.99.0/24", "100::/64", "100:0:0:1::/64", "5f00::/16"),
    "for documentation": _networks("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20"),
    "for benchmarks": _networks("198.18.0.0/15"),
    # What has another address in it is dialled as that other one, somewhere: none of these is.
    "mapped or translated": _networks("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"),
    "6to4": _networks("2002::/16"),
    "Teredo, or of another protocol": _networks("2001::/23"),
}
"""Addresses that no setting allows."""
PRIVATE: dict[str, tuple[Network, ...]] = {
    "loopback": _networks("127.0.0.0/8", "::1/128"),
    "private": _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10"),
    "shared (carrier-grade NAT)": _networks("100.64.0.0/10"),
}
"""Addresses that `SAMPHIRE_WEBHOOK_ALLOW_PRIVATE=true` allows."""
_COMPATIBLE = IPv6Network("::/96")


@lru_cache(maxsize=4096)
def why_refused(address: IPAddress, *, allow_private: bool = False) -> str | None:
    """What an address is that makes it one not to be dialled; None where it may be."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "link-local"
    for kinds in (NEVER,) if allow_private else (NEVER, PRIVATE):
        for kind, networks in kinds.items():
            if any(address in network for network in networks):
                return kind
    if address in _COMPATIBLE and not (allow_private and address == IPv6Address("::1")):
        return "mapped or translated"
    return None


@dataclass(frozen=True)
class TargetPolicy:
    """Which URLs a deployment takes."""

    schemes: tuple[str, ...] = DEFAULT_SCHEMES
    ports: tuple[int, ...] = DEFAULT_PORTS
    allow_private: bool = False


@dataclass(frozen=True)
class Target:
    """A URL that was checked."""

    url: str
    """As it is sent to: without a fragment, its host in the form that is looked up."""
    scheme: str
    host: str
    """Small letters, ASCII; an address without brackets."""
    port: int

    @property
    def origin(self) -> str:
        """Scheme, host and port: what may be shown, since the rest of a URL may hold a secret."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def check_url(url: object, policy: TargetPolicy) -> Target:
    """Read a URL to send webhooks to.

    Raises:
        InvalidInputError: it is none, or one that this deployment does not take; says neither its path nor its query,
            which may hold a secret.
    """
    parsed = _parsed(url)
    schemes, ports = policy.schemes, policy.ports
    if parsed.scheme not in schemes:
        raise InvalidInputError(
            f"expected a webhook URL that begins with {_either(f'{scheme}://' for scheme in schemes)}, given "
            f"{parsed.scheme[:20]!r} (SAMPHIRE_WEBHOOK_SCHEMES)"
        )
    if parsed.raw_user is not None or parsed.raw_password is not None:
        raise InvalidInputError("expected a webhook URL without a user or password: webhooks are signed instead")
    host = _checked_host(parsed)
    port = parsed.port
    if port not in ports:
        raise InvalidInputError(
            f"expected a webhook URL with the port {_either(map(str, ports))}, given {port} (SAMPHIRE_WEBHOOK_PORTS)"
        )
    check_literal(host, policy)
    return Target(str(parsed.with_fragment(None)), parsed.scheme, host, port)


def check_literal(host: str, policy: TargetPolicy) -> None:
    """Check an address that stands in a URL: no resolver is asked about one.

    Raises:
        InvalidInputError: it must not be dialled.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return  # a name: its addresses are checked when they are found
    if why_refused(address, allow_private=policy.allow_private) is not None:
        raise InvalidInputError(REFUSED_ADDRESS)


REFUSED_ADDRESS = (
    "the address of the webhook is not one that webhooks are sent to (private, link-local or reserved; "
    "SAMPHIRE_WEBHOOK_ALLOW_PRIVATE=true allows private ones)"
)
"""One text for all of them, whether somebody listens there or not: the answer must not map a network."""


def is_url(text: str) -> bool:
    """Whether a webhook is given as a URL, and not as the name of an endpoint."""
    return "://" in text


def _parsed(url: object) -> URL:
    if not isinstance(url, str) or not 1 <= len(url) <= URL_CHARACTERS:
        raise InvalidInputError(f"expected a webhook URL of at most {URL_CHARACTERS} characters")
    if any(character.isspace() or not character.isprintable() for character in url) or "\\" in url:
        raise InvalidInputError("expected a webhook URL without spaces, control characters and backslashes")
    from yarl import URL  # only who sends webhooks needs it

    try:
        parsed = URL(url)
        _ = parsed.port, parsed.raw_host  # looked at only now
    except (ValueError, TypeError, UnicodeError) as error:
        raise InvalidInputError("expected a webhook URL such as https://example.com/hook, given none") from error
    if not parsed.absolute or not parsed.raw_host or parsed.port is None:
        raise InvalidInputError("expected a webhook URL such as https://example.com/hook, given one without a host")
    return parsed


def _checked_host(parsed: URL) -> str:
    # As aiohttp takes it: full-width digits and ideographic dots are ASCII by then.
    host = (parsed.raw_host or "").lower()
    if "%" in host:
        raise InvalidInputError("expected a webhook URL whose address has no zone")
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        return host
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise InvalidInputError(
            "expected a webhook URL whose host is a name of letters, digits and hyphens, without a dot at its end"
        )
    if _NUMBER.fullmatch(host.rpartition(".")[2]):  # 127.1, 0x7f.1: some resolvers take these for addresses
        raise InvalidInputError("expected a webhook URL whose address is written with four numbers, or as IPv6")
    return host


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
