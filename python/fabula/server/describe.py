"""The OpenAPI description: decorators of routes, and quart-schema's document completed with what all routes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from quart import Blueprint
from quart_schema import Info, OpenAPIProvider, document_response, tag, validate_request

from fabula import __version__
from fabula.server.examples import EXAMPLES
from fabula.server.gate import is_open
from fabula.server.replies import AnswerReply, BegunReply, ErrorReply

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = {
    400: "The request is invalid; the message names the field and what is allowed.",
    401: "The API key is missing or unknown.",
    403: "The Host header is not allowed, or the call came from a page of another site.",
    404: "Not found, or it belongs to another key.",
    408: "The body took too long to arrive.",
    409: "A reply of the session is being generated, the session is full, or the answer was stopped.",
    413: "Too large.",
    415: "Not JSON.",
    429: "A limit of the key is reached; `Retry-After` says when to retry.",
    500: "The server failed.",
    503: "The queue is full, a model is loading, or the server is stopping; `Retry-After` says when to retry.",
    504: "The answer took longer than the server allows.",
    507: "No room on the disk.",
}
READING = (400, 401, 403, 404, 503)
WRITING = (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 507)
LENDING = (*WRITING, 504)  # of routes of other APIs that answer: a partial answer is an error there


def info() -> Info:
    """Title and summary of the API."""
    return Info(
        title="Fabula",
        version=__version__,
        description=(
            "A conversation is a tree of turns, and every turn is a snapshot. Rollback, fork and replay are exact and "
            "recompute nothing."
        ),
    )


def fails(*statuses: int, reply: type[BaseModel] = ErrorReply) -> Callable[[F], F]:
    """Documents the errors of a route; `reply` is their shape, a model whose name ends with ErrorReply."""

    def decorate(function: F) -> F:
        for status in statuses:
            function = document_response(reply, status)(function)
        return function

    return decorate


def answer_route(
    routes: Blueprint, path: str, body: type[BaseModel], group: str, reply: type[BaseModel] = AnswerReply
) -> Callable[[F], F]:
    """Registers a route of Fabula's own API that answers: whole, as a stream, or in the background."""

    def decorate(function: F) -> F:
        function = document_response(BegunReply, 202)(fails(*WRITING)(function))
        function = document_response(reply, 200)(function)
        return cast(F, routes.post(path)(streams(tag([group])(validate_request(body)(function)))))

    return decorate


def verb_route(
    routes: Blueprint, path: str, body: type[BaseModel], group: str, reply: type[BaseModel]
) -> Callable[[F], F]:
    """Registers a route of Fabula's own API that replies at once."""

    def decorate(function: F) -> F:
        function = document_response(reply, 200)(fails(*WRITING)(function))
        return cast(F, routes.post(path)(tag([group])(validate_request(body)(function))))

    return decorate


def streams(function: F) -> F:
    """Documents that a route may send events instead of JSON."""
    return sends("text/event-stream")(function)


def sends(*media_types: str) -> Callable[[F], F]:
    """Documents that a route may reply with other types than JSON, such as a stream of events."""

    def decorate(function: F) -> F:
        function._fabula_types = media_types  # type: ignore[attr-defined]
        return function

    return decorate


class Describer(OpenAPIProvider):
    """The OpenAPI document of a server."""

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = super().schema()
        found["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"] = {str(status): one for status, one in operation["responses"].items()}
        views = {}
        for rule in self._app.url_map.iter_rules():
            path = _braces(rule.rule)
            views[path] = self._app.view_functions[rule.endpoint]
        for path, operations in found.get("paths", {}).items():
            for method, operation in operations.items():
                if "requestBody" in operation:
                    operation["requestBody"]["required"] = True
                    if (method, path) in EXAMPLES:
                        operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[method, path]
                if is_open(path):
                    operation["security"] = []
                responses = operation.get("responses", {})
                for status, response in responses.items():
                    if int(status) in STATUSES and "ErrorReply" in str(response):
                        response["description"] = STATUSES[int(status)]
                view = views.get(path)
                for media_type in getattr(view, "_fabula_types", ()) if method in ("get", "post") else ():
                    found_200 = responses.setdefault("200", {"description": "Events."})
                    found_200.setdefault("content", {})[media_type] = {"schema": {}}
        return found


def _braces(rule: str) -> str:
    """A rule in OpenAPI's notation."""
    return "/".join(
        "{" + part[1:-1].rpartition(":")[2] + "}" if part.startswith("<") else part for part in rule.split("/")
    )
