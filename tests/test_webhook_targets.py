"""Where webhooks may go: URLs, and the table of addresses, beside an independent oracle."""

from __future__ import annotations

import itertools
from ipaddress import ip_address, ip_network

import pytest
import ssrfguard
from hypothesis import given
from hypothesis import strategies as st

from samphire import InvalidInputError
from samphire.webhooks.targets import NEVER, PRIVATE, TargetPolicy, check_url, is_url, why_refused

ANY = TargetPolicy(("https", "http"), tuple(range(1, 65536)), allow_private=True)
INNER = ("127.0.0.1", "10.0.0.1", "169.254.169.254")


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
        "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.1",
        "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1",
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1",
        "2001::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1",
        "3fff::1", "5f00::1", "fc00::1", "fd12::1", "fe80::1", "fe80::1%eth0", "febf::1", "fec0::1", "ff02::1",
        "ff0e::1",
    ],
)  # fmt: skip
def test_these_are_never_dialled_by_default(address: str) -> None:
    """Whatever the standard library calls them."""
    assert why_refused(ip_address(address)) is not None


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.0", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
)
def test_these_are(address: str) -> None:
    """Addresses of the whole world."""
    assert why_refused(ip_address(address)) is None


def test_private_ones_are_a_setting_and_no_other() -> None:
    """Link-local is not even then, nor what hides another address."""
    for kind, networks in PRIVATE.items():
        for network in networks:
            assert why_refused(network[0]) is not None and why_refused(network[-1]) is not None, kind
            assert why_refused(network[-1], allow_private=True) is None, kind
    for kind, networks in NEVER.items():
        for network in networks:
            assert why_refused(network[0], allow_private=True) is not None, kind
            assert why_refused(network[-1], allow_private=True) is not None, kind


def test_nothing_passes_that_an_independent_guard_refuses() -> None:
    """The package ssrfguard, at the edges of every special network, and at addresses that hide others."""
    policy = ssrfguard.Policy()
    seen = 0
    for network in itertools.chain.from_iterable((*NEVER.values(), *PRIVATE.values())):
        for number in (int(network[0]) - 1, int(network[0]), int(network[-1]), int(network[-1]) + 1):
            if not 0 <= number < 2**network.max_prefixlen:
                continue
            address = type(network[0])(number)
            if refused_by_guard(policy, str(address)):
                seen += 1
                assert why_refused(address) is not None, address
    for inner in INNER:
        number = int(ip_address(inner))
        for hidden in (f"::ffff:{inner}", f"64:ff9b::{inner}", f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1"):
            assert why_refused(ip_address(hidden)) is not None
    assert seen > 20


def refused_by_guard(policy: ssrfguard.Policy, address: str) -> bool:
    return not policy.permits_address(ip_address(address))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_nothing_passes_at_random_either(address: object) -> None:
    """As above."""
    if refused_by_guard(ssrfguard.Policy(), str(address)):
        assert why_refused(ip_address(str(address))) is not None


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook", "https://example.com:8443/a?b=c", "https://EXAMPLE.com", "https://bücher.example/x",
        "https://xn--bcher-kva.example/x", "https://8.8.8.8/x", "https://[2606:4700::1111]/x", "https://a_b.example/x",
    ],
)  # fmt: skip
def test_these_urls_are_taken(url: str) -> None:
    """The defaults: https, the ports 443 and 8443."""
    target = check_url(url, TargetPolicy())
    assert target.scheme == "https" and target.port in (443, 8443) and target.host.isascii()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com/", "https://"),
        ("ftp://example.com/", "https://"),
        ("https://example.com:22/", "port"),
        ("https://example.com:0/", "port"),
        ("https://user:secret@example.com/", "user or password"),
        ("https://example.com./", "dot at its end"),
        ("https://", "host"),
        ("https:///x", "host"),
        ("example.com/hook", "URL"),
        ("", "URL"),
        (None, "URL"),
        ("https://exa mple.com/", "spaces"),
        ("https://example.com/\x00", "control"),
        ("https://example.com\\@evil.example/", "backslashes"),
        ("https://-a.example/", "letters"),
        ("https://a..example/", "letters"),
        (f"https://{'a' * 64}.example/", "letters"),
        (f"https://example.com/{'a' * 3000}", "2048"),
        ("https://[::1]/", "not one that webhooks are sent to"),
        ("https://[fe80::1%25eth0]/", "URL|zone"),
        ("https://127.0.0.1/", "not one that webhooks are sent to"),
        ("https://１２７.０.０.１/", "not one that webhooks are sent to"),
        ("https://127。0。0。1/", "not one that webhooks are sent to"),
        ("https://[::ffff:127.0.0.1]/", "not one that webhooks are sent to"),
        ("https://127.1/", "four numbers"),
        ("https://0x7f.0.0.1/", "four numbers"),
        ("https://0x7f000001/", "four numbers"),
        ("https://2130706433/", "four numbers"),
        ("https://0177.0.0.1/", "four numbers|not one that"),
        ("https://example.com:port/", "URL"),
    ],
)
def test_these_are_refused_with_what_was_expected(url: object, expected: str) -> None:
    """At `add`, at `submit`, and before each attempt, by one function."""
    with pytest.raises(InvalidInputError, match=expected) as raised:
        check_url(url, TargetPolicy())
    assert "secret" not in str(raised.value)


def test_a_refused_address_has_one_text() -> None:
    """Whether somebody could listen there or not: nobody maps a network by the answers."""
    texts = set()
    for host in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "192.0.2.1"):
        with pytest.raises(InvalidInputError) as raised:
            check_url(f"https://{host}/", TargetPolicy())
        texts.add(str(raised.value))
    assert len(texts) == 1


def test_what_is_shown_of_a_url_holds_no_secret() -> None:
    """Its origin alone; a fragment is not sent."""
    target = check_url("https://[2606:4700::1111]:8443/hook/token?key=1#part", TargetPolicy())
    assert target.origin == "https://[2606:4700::1111]:8443" and "#" not in target.url
    assert is_url("https://x") and not is_url("orders")


@pytest.mark.parametrize("network", ["127.0.0.0/8", "10.0.0.0/8", "::1/128"])
def test_private_urls_are_taken_where_they_are_allowed(network: str) -> None:
    """`SAMPHIRE_WEBHOOK_ALLOW_PRIVATE=true`."""
    host = str(ip_network(network)[0] if network.startswith("::") else ip_network(network)[1])
    assert check_url(f"http://[{host}]:81/" if ":" in host else f"http://{host}:81/", ANY).port == 81
    for never in ("169.254.169.254", "[fe80::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
        with pytest.raises(InvalidInputError):
            check_url(f"http://{never}/", ANY)
