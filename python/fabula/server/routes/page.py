"""The web page: its files, markdown for its answers, and the changes of a session that it follows."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any

from pydantic import Field
from quart import Blueprint, Response, g, request
from quart_schema import document_response, hide, tag, validate_request

from fabula.server.describe import READING, WRITING, fails, streams
from fabula.server.failures import not_found
from fabula.server.feed import Change
from fabula.server.render import render
from fabula.server.replies import ReplyModel
from fabula.server.schemas import Strict
from fabula.server.state import Server, server
from fabula.server.stream import KEEP_ALIVE, dumps, response
from fabula.sessions.session import Session

routes = Blueprint("page", __name__)

SMALL_TEXT = 2_000  # characters rendered at once, by the event loop's thread: about a millisecond
MAX_TEXTS = 256


# ---- Files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    etag: str
    kind: str


def _read(folder: Traversable, prefix: str = "") -> dict[str, _File]:
    """Every file of the page, by its path; all are kept in memory."""
    found: dict[str, _File] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read(entry, f"{prefix}{entry.name}/")
        elif (kind := mimetypes.guess_type(entry.name)[0]) is not None:
            data = entry.read_bytes()
            kind = "text/javascript" if entry.name.endswith(".js") else kind
            found[prefix + entry.name] = _File(data, hashlib.sha256(data).hexdigest()[:20], kind)
    return found


@cache
def _files() -> dict[str, _File]:
    return _read(files("fabula") / "web")


async def _send(name: str) -> Response:
    file = (await server().call(_files)).get(name)
    if file is None:
        raise not_found("file", name[:128])
    sent = Response(file.data, content_type=f"{file.kind}; charset=utf-8")
    sent.set_etag(file.etag)
    sent.headers["Cache-Control"] = "no-cache"  # cached, and revalidated each time
    if request.if_none_match.contains(file.etag):
        sent.status_code = 304
        sent.set_data(b"")
    return sent


@routes.get("/")
@hide
async def index() -> Response:
    return await _send("index.html")


@routes.get("/static/<path:name>")
@hide
async def static(name: str) -> Response:
    return await _send(name)


@routes.get("/favicon.ico")
@hide
async def favicon() -> Response:
    return await _send("icon.svg")


# ---- Markdown -------------------------------------------------------------------------------------------------------


class RenderBody(Strict):
    """Texts in markdown."""

    texts: Annotated[list[str], Field(max_length=MAX_TEXTS)]


class RenderedReply(ReplyModel):
    """A text as clean HTML blocks. Appending to the text changes only blocks from `last_line` on."""

    blocks: list[str]
    last_line: int


class RenderReply(ReplyModel):
    """Texts as HTML, in their order."""

    rendered: list[RenderedReply]


@routes.post("/render")
@tag(["Text"])
@validate_request(RenderBody)
@document_response(RenderReply, 200)
@fails(*WRITING)
async def render_texts(data: RenderBody) -> Any:
    """Renders markdown to HTML without scripts, styles, images or events. Nothing is stored."""
    state = server()
    for text in data.texts:
        state.limits.check_text(text, "texts")

    def work() -> dict[str, Any]:
        return {"rendered": [asdict(render(text)) for text in data.texts]}

    return work() if sum(map(len, data.texts)) <= SMALL_TEXT else await state.call(work)


# ---- Changes --------------------------------------------------------------------------------------------------------


@routes.get("/sessions/<id>/events")
@streams
@tag(["Sessions"])
@fails(*READING, 429)
async def events(id: str) -> Any:
    """The changes of a session: first the event `state`, with the running answers, then each change, in order."""
    state, tenant = server(), g.tenant
    state.feed.check(tenant)
    session = await state.call(lambda: state.workspace.open(id, tenant=tenant))
    return response(_told(state.feed.follow(tenant, session.id, lambda: _standing(state, session))))


def _standing(state: Server, session: Session) -> dict[str, Any]:
    runs = state.runs.of_session(session.tenant, session.id)
    return {
        "session_id": session.id,
        "head_id": session.head.id,
        "streams": [run.events[0].data for run in runs],
    }


async def _told(changes: AsyncIterator[Change | None]) -> AsyncIterator[bytes]:
    async for change in changes:
        if change is None:
            yield KEEP_ALIVE
            continue
        number, what, data = change
        yield f"id: {number}\nevent: {what}\ndata: {dumps(data)}\n\n".encode()
