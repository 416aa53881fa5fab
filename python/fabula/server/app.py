"""Creates the app: gate, routes, JSON and errors. Any ASGI host may run it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from quart import Quart, Request, Response, g, request
from quart.json.provider import DefaultJSONProvider
from quart_schema import QuartSchema, RequestSchemaValidationError
from werkzeug.exceptions import HTTPException, RequestTimeout

from fabula.errors import EngineError, InvalidArgument
from fabula.server import body, queries
from fabula.server.describe import Describer, info
from fabula.server.faces import error_body, reads_any_type
from fabula.server.failures import INTERNAL, ApiError, of_engine
from fabula.server.gate import Gate, Keys
from fabula.server.logs import Log
from fabula.server.observer import Observer, notify
from fabula.server.openai.tolerance import ignored_fields, name_ignored
from fabula.server.paths import canonical, nearest
from fabula.server.routes import blueprints
from fabula.server.settings import Settings
from fabula.server.state import Server, server
from fabula.server.stream import dumps, dumps_in_parts, is_large
from fabula.server.telemetry import Traces
from fabula.server.validation import body_error
from fabula.workspace import Workspace

SMALL_BODY = 32_768  # bytes; larger bodies are parsed in a worker thread
IMPORT_FACTOR = 32  # limit of an imported session's size, in units of `max_body_bytes`


def create_app(workspace: Workspace, settings: Settings | None = None) -> Quart:
    """The server as an ASGI app.

    Args:
        workspace: holds the sessions; stays open when the app ends.
        settings: None for the defaults.

    Raises:
        InvalidArgument: the keys cannot be read, or they are missing and other machines can reach the address.
    """
    settings = settings or Settings()
    keys = Keys.read(settings.keys) if settings.keys is not None else None
    check_access(settings)
    app = _App("fabula.server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["BODY_TIMEOUT"] = settings.body_s
    app.config["QUART_SCHEMA_CONVERSION_PREFERENCE"] = "pydantic"
    app.request_class = _request_class(settings)
    QuartSchema(
        app,
        openapi_path=None,  # routes/docs.py has it
        swagger_ui_path=None,
        redoc_ui_path=None,
        scalar_ui_path=None,
        info=info(),
        conversion_preference="pydantic",
        openapi_provider_class=Describer,
        security_schemes={"key": {"type": "http", "scheme": "bearer"}},
        security=[{"key": []}] if keys is not None else None,
    )
    app.json = _Json(app)
    state = Server(workspace, settings)
    app.extensions["fabula"] = state
    state.observers += [state.metrics, state.feed, Log(settings), *([Traces()] if settings.traces else [])]
    state.gate = Gate(settings, keys)
    app.before_request(_notice)
    state.gate.install(app)
    queries.install(app)
    app.after_request(name_ignored)
    app.after_request(_watch)
    _handle_errors(app)
    for blueprint in blueprints():
        app.register_blueprint(blueprint)
    app.before_serving(state.start)
    app.after_serving(state.stop)
    return app


def check_access(settings: Settings) -> None:
    """Raises InvalidArgument if other machines can reach the server without a key."""
    if settings.keys is None and not settings.insecure and not settings.is_loopback:
        raise InvalidArgument(
            f"other machines can reach {settings.host}, so API keys are needed: --keys FILE (`fabula keys` makes "
            "them), or --insecure to serve them without"
        )


class _App(Quart):
    """Writes large replies as JSON in a worker thread."""

    async def make_response(self, result: Any) -> Any:
        body, *rest = result if isinstance(result, tuple) else (result,)
        if isinstance(body, (dict, list)) and is_large(body):
            text = await asyncio.to_thread(dumps_in_parts, body)
            response = Response(text + "\n", mimetype="application/json")
            result = (response, *rest) if rest else response
        return await super().make_response(result)


class _Json(DefaultJSONProvider):
    """Strict JSON in requests; in responses, non-ASCII characters stay as they are."""

    sort_keys = False
    ensure_ascii = False

    def loads(self, s: str | bytes, **_kwargs: Any) -> Any:
        data: bytes = s.encode() if isinstance(s, str) else s
        return body.parse(data)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        return Response(dumps(self._prepare_response_obj(args, kwargs)) + "\n", mimetype="application/json")


def _request_class(settings: Settings) -> type[Request]:
    class ApiRequest(Request):
        """A request whose body is limited by its path."""

        def __init__(self, method: str, scheme: str, path: str, *args: Any, **kwargs: Any) -> None:
            path = canonical(path)
            if path == "/sessions/import":
                kwargs["max_content_length"] = IMPORT_FACTOR * settings.max_body_bytes
            super().__init__(method, scheme, path, *args, **kwargs)

        async def get_json(self, *_args: Any, **_kwargs: Any) -> Any:
            if not self.is_json and not reads_any_type(self):
                raise ApiError(
                    415, "unsupported_media_type", "send JSON, with the header Content-Type: application/json"
                )
            if self.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise ApiError(415, "unsupported_encoding", "send the body without Content-Encoding")
            if self.content_length is not None and self.content_length > (self.max_content_length or 0):
                raise too_large(self.max_content_length or 0)
            # Not Quart's get_data: its wait_for may swallow the cancellation of a client that left, before Python 3.12.
            try:
                async with asyncio.timeout(settings.body_s):
                    data: bytes = await self.body
            except TimeoutError:
                raise RequestTimeout from None
            if len(data) < SMALL_BODY:
                return body.parse(data)
            return await asyncio.to_thread(body.parse, data)  # takes some 50 ms for each MB

    return ApiRequest


def too_large(most: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {most} bytes", limit=most)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def _handle_errors(app: Quart) -> None:
    @app.errorhandler(ApiError)
    async def api_error(error: ApiError) -> Response:
        return _respond(error)

    @app.errorhandler(EngineError)
    async def engine_error(error: EngineError) -> Response:
        found = of_engine(error)
        if found.status >= 500:
            _tell(error)
        return _respond(found)

    @app.errorhandler(RequestSchemaValidationError)
    async def invalid(error: RequestSchemaValidationError) -> Response:
        return _respond(body_error(error.validation_error, ignored_fields()))

    @app.errorhandler(HTTPException)
    async def http(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 413:
            return _respond(too_large(request.max_content_length or 0))
        words = {405: f"the path does not answer {request.method}"}
        if status == 404:
            near = nearest(request.path, (rule.rule for rule in app.url_map.iter_rules()))
            words[404] = "there is no such path" + (f"; did you mean {near}?" if near else "")
        words[408] = "the body took too long to arrive"
        message = words.get(status, error.description or error.name)
        found = ApiError(status, error.name.lower().replace(" ", "_"), message)
        response = _respond(found)
        if status == 405:
            response.headers["Allow"] = ", ".join(sorted(getattr(error, "valid_methods", None) or []))
        return response

    @app.errorhandler(Exception)
    async def unexpected(error: Exception) -> Response:
        _tell(error)
        return _respond(INTERNAL)


def _tell(error: BaseException) -> None:
    notify(server().observers, Observer.failed, None, error)


def _respond(error: ApiError) -> Response:
    response = Response(dumps(error_body(request.path, error)) + "\n", status=error.status, mimetype="application/json")
    response.headers.update(error.headers())
    return response


async def _notice() -> None:
    notify(server().observers, Observer.request_started)


async def _watch(response: Response) -> Response:
    seconds = time.perf_counter() - g.get("started", time.perf_counter())
    rule = request.url_rule
    notify(
        server().observers,
        Observer.request_ended,
        method=request.method,
        route=rule.rule if rule is not None else "",
        status=response.status_code,
        seconds=seconds,
        request_id=g.get("request_id", ""),
    )
    return response
