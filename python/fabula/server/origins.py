"""Host and Origin headers: under which names the server is called, and whose pages may call it."""

from __future__ import annotations

import ipaddress
import re
import socket

from fabula.errors import InvalidArgument

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/*\s]*\*?/?")  # RFC 6454, section 6.2, of any scheme


def host_of(header: str) -> str:
    """The host of a Host header, without its port, in lower case."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") <= 1 else text


def is_known_host(header: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header names this server: an IP address, one of the machine's own names, or one of `allowed`.

    This stops DNS rebinding: an attacker who points a name at this machine reaches the server under that name, but has
    no control over addresses and the machine's own names.
    """
    host = host_of(header)
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        pass
    own = socket.gethostname().lower()
    known = {"localhost", own, own.partition(".")[0] + ".local", *(name.lower() for name in allowed)}
    return host in known or host.endswith(".localhost")


def is_own_origin(origin: str, host_header: str, allowed: tuple[str, ...]) -> bool:
    """Whether pages of an origin may call: the server's own origin, or one of `allowed`."""
    scheme, _, rest = origin.partition("://")
    if is_named_origin(origin, allowed):
        return True
    return scheme in ("http", "https") and rest.lower() == host_header.strip().lower()


def is_named_origin(origin: str, allowed: tuple[str, ...]) -> bool:
    """Whether an origin is one of `allowed`, as the setting `cors` has them."""
    scheme, _, rest = origin.partition("://")
    if "loopback" in allowed and scheme in ("http", "https") and is_loopback_host(host_of(rest)):
        return True
    text = origin.rstrip("/").lower()
    for name in allowed:
        wanted = name.rstrip("/").lower()
        if text == wanted or (wanted.endswith("*") and text.startswith(wanted[:-1])):
            return True
    return False


def is_loopback_host(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_origin(name: str) -> None:
    """Checks a value of the setting `cors`.

    Raises:
        InvalidArgument: it is no origin, nor one of the words that stand for several.
    """
    if name not in ("*", "null", "loopback") and not _ORIGIN.fullmatch(name):
        raise InvalidArgument(
            f"cors holds {name!r}, must be an origin such as https://example.org or app://obsidian.md, one with * at "
            "its end, loopback, null, or * for every page"
        )
