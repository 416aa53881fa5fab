"""The gate: checks every request before its route runs, and sets the headers of every response.

The checks, in order: contradictory lengths, Host header, Origin header, API key, and whether the server is stopping.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from quart import Quart, Response, g, request

from fabula.errors import InvalidArgument
from fabula.server.failures import ApiError
from fabula.server.origins import is_known_host, is_named_origin, is_own_origin
from fabula.server.settings import Settings

# Paths that need no key: pages, the API description, and the health check.
OPEN = frozenset({"/", "/docs", "/docs/style.css", "/openapi.json", "/health", "/favicon.ico"})
OPEN_BEHIND = "/static/"

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MIN_KEY_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys, by the hash of each.

    Attributes:
        names: name by SHA-256 digest.
    """

    names: dict[bytes, str]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Reads keys from a file: `name:key` or `name:sha256:hash` on each line; # starts a comment.

        Raises:
            InvalidArgument: the file cannot be read, or a line is malformed; names the line, never the key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"keys: {path}: {error}") from None
        names: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, _, key = text.partition(":")
            if not _KEY_NAME.fullmatch(name):
                raise InvalidArgument(f"keys: {path}: line {number} must start with a name and a colon")
            if name in names.values():
                raise InvalidArgument(f"keys: {path}: line {number} repeats the name {name}")
            if key.startswith("sha256:"):
                digest = _hash(key[7:])
                if digest is None:
                    raise InvalidArgument(f"keys: {path}: line {number} must have 64 hexadecimal digits after sha256:")
            elif len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidArgument(
                    f"keys: {path}: the key on line {number} must be {MIN_KEY_LENGTH} or more printable ASCII letters; "
                    "`fabula keys` makes one"
                )
            else:
                digest = hashlib.sha256(key.encode()).digest()
            names[digest] = name
        if not names:
            raise InvalidArgument(f"keys: {path}: holds no key")
        return cls(names)

    def owner(self, key: str) -> str | None:
        """The name of a key; None if it is unknown. Compares with every key in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def _hash(text: str) -> bytes | None:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        return None
    return digest if len(digest) == 32 else None


def new_key() -> str:
    """A random key of 256 bits."""
    return "fab_" + secrets.token_urlsafe(32)


def is_key_name(name: str) -> bool:
    """Whether a name is valid for a key."""
    return _KEY_NAME.fullmatch(name) is not None


# ---- The gate -------------------------------------------------------------------------------------------------------


class Gate:
    """Checks requests and completes responses.

    Args:
        settings: of the server.
        keys: None for a server without keys.

    Attributes:
        is_draining: whether the server is stopping: then new requests get 503.
    """

    def __init__(self, settings: Settings, keys: Keys | None) -> None:
        self._settings, self._keys = settings, keys
        self.is_draining = False

    def install(self, app: Quart) -> None:
        """Registers the gate's hooks with an app."""
        app.before_request(self._enter)
        app.after_request(self._leave)

    async def _enter(self) -> Response | None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        g.started = time.perf_counter()
        g.tenant = ""
        settings = self._settings
        if "Transfer-Encoding" in request.headers and "Content-Length" in request.headers:
            # Request smuggling: a proxy may use the other length and see another request (RFC 9112, section 6.3).
            g.is_torn = True
            raise ApiError(400, "two_lengths", "send either Content-Length or Transfer-Encoding, not both")
        host = request.headers.get("Host", "")
        checks_host = self._keys is None or settings.is_loopback or bool(settings.allow_host)
        if checks_host and request.path != "/health" and not is_known_host(host, settings.allow_host):
            raise ApiError(
                403, "host_not_allowed", f"{host[:128]!r} is not a name of this server; --allow-host adds names"
            )
        origin = request.headers.get("Origin")
        if origin is not None and not is_own_origin(origin, host, settings.cors):
            g.refused_origin = True
            raise ApiError(
                403,
                "origin_not_allowed",
                f"pages of {origin[:128]!r} may not call this server; `--cors {origin[:128]}` allows them",
            )
        if request.method == "OPTIONS" and origin is not None and "Access-Control-Request-Method" in request.headers:
            return Response(status=204)  # a preflight carries no key
        if self._keys is not None and not is_open(request.path):
            g.tenant = self._owner()
        if self.is_draining and request.path != "/health":
            raise ApiError(503, "stopping", "the server is stopping; try again soon", retry_after=5)
        return None

    def _owner(self) -> str:
        """The owner of the request's key. Without an Authorization header the key may be in `x-api-key`, where
        Anthropic's clients send it."""
        assert self._keys is not None
        values, others = (request.headers.getlist(name) for name in ("Authorization", "X-Api-Key"))
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if not values and len(others) == 1:
            scheme, key = "bearer", others[0]
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401, "invalid_api_key", "send a key of this server: `Authorization: Bearer KEY`, or `x-api-key: KEY`"
            )
        return owner

    async def _leave(self, response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Request-Id"] = g.get("request_id", "")
        # The rest of an unread body must not be parsed as the next request, so close the connection after it.
        is_whole = request.body._complete.is_set() and not g.get("is_torn")
        if not is_whole and request.http_version in ("1.0", "1.1"):
            response.headers["Connection"] = "close"
        origin = request.headers.get("Origin")
        if origin is not None and g.get("refused_origin") and request.method != "OPTIONS":
            # The page may read why, and nothing else.
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            response.headers.add("Vary", "Origin")
        elif origin is not None and is_named_origin(origin, self._settings.cors):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers.add("Vary", "Origin")
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            asked = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Headers"] = asked or "Authorization, Content-Type, Last-Event-ID"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, PATCH, DELETE, OPTIONS"
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After, fabula-ignored"
        return response


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_BEHIND)
