"""Models of a running server for the `llm` program, with conversations that the server keeps.

A conversation is a session of the server, named after it: each prompt sends only itself and says which turn it follows,
so nothing is encoded or computed again. `llm -c` continues a conversation of another day; `FabulaModel.rollback` and
`fork` go back, and on from any response.

The server is that of FABULA_URL, and its key, if it has keys, that of `llm keys set fabula` or FABULA_API_KEY.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, cast

import llm
from pydantic import Field

ADDRESS = "http://127.0.0.1:8000"  # where `fabula serve` listens by default
LIST_S = 2.0  # for the list of models, which every command of llm asks for
ANSWER_S = 3600.0
Json = dict[str, Any]


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Callable[..., None]) -> None:
    """Registers the models of the server as fabula/NAME; none if there is no server."""
    server = Server()
    try:
        names = [str(one["id"]) for one in server.get("/v1/models", LIST_S)["data"]]
    except (OSError, ValueError, LookupError, TypeError, llm.ModelError):
        return
    for name in names:
        register(FabulaModel(name, server))


class Refused(llm.ModelError):  # type: ignore[misc]
    """The server refused a request.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server over HTTP.

    Args:
        url: its address; None for that of FABULA_URL.
        key: None for the one that llm knows.
    """

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self._url = (url or os.environ.get("FABULA_URL") or ADDRESS).rstrip("/")
        self._key = key

    def get(self, path: str, timeout: float = ANSWER_S) -> Json:
        """The JSON of a path.

        Raises:
            Refused: the server refuses.
            OSError: there is no server.
        """
        with self._open(path, None, timeout) as reply:
            return cast(Json, json.load(reply))

    def post(self, path: str, **body: Any) -> Json:
        """The JSON that a route replies with; raises as `get`."""
        with self._open(path, body, ANSWER_S) as reply:
            return cast(Json, json.load(reply))

    def events(self, path: str, **body: Any) -> Iterator[tuple[str, Json]]:
        """The events of a stream, by their names; raises as `get`."""
        with self._open(path, body | {"stream": True}, ANSWER_S) as reply:
            kind = ""
            for line in reply:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def _open(self, path: str, body: Json | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        key = self._key or llm.get_key(alias="fabula", env="FABULA_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(_message(error.read()), error.code) from None


def _message(body: bytes) -> str:
    """The message of an error's body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300].decode("utf-8", "replace")


class FabulaModel(llm.Model):  # type: ignore[misc]
    """A model of a server.

    Args:
        name: of the model there.
        server: None for the default one.
    """

    can_stream = True

    class Options(llm.Options):  # type: ignore[misc]
        """Sampling settings; those that are not given are the model's own."""

        temperature: float | None = Field(None, description="0 always takes the likeliest token.", ge=0)
        top_p: float | None = Field(None, description="Keep the likeliest that make up this probability.", gt=0, le=1)
        top_k: int | None = Field(None, description="Keep the k likeliest; 0 is off.", ge=0)
        max_tokens: int | None = Field(None, description="Tokens to generate at most.", ge=1)
        seed: int | None = Field(None, description="Makes the answer repeatable.", ge=0)

    def __init__(self, name: str, server: Server | None = None) -> None:
        self.model_id = f"fabula/{name}"
        self._name, self._server = name, server or Server()
        self._forks: set[str] = set()  # ids of conversations whose session is a fork

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Answers a prompt as the turn after the conversation's last one.

        Raises:
            llm.ModelError: the server refuses, or no longer has the conversation.
        """
        body: Json = {"message": prompt.prompt}
        body |= {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        id, turn = self._place(conversation)
        if not self._goes_to(id, turn):
            body |= {"model": self._name} | ({"system": prompt.system} if prompt.system else {})
        body |= {"session_id": id} if id else {}
        found: Json = {}
        for kind, data in self._server.events("/chat", **body):
            if kind == "token":
                if stream and data["text"]:
                    yield data["text"]
            elif kind == "error":
                raise llm.ModelError(data["error"]["message"])
            elif kind in ("done", "cancelled"):
                found = data
        if not stream:
            yield found.get("text", "")
        response.response_json = {name: found.get(name) for name in ("session_id", "turn", "finish_reason", "usage")}
        usage = found.get("usage") or {}
        response.set_usage(input=usage.get("prompt_tokens"), output=usage.get("generated_tokens"))

    def rollback(self, conversation: llm.Conversation, n: int = 1) -> None:
        """Goes back n responses: the next prompt follows the one before them, and the server computes nothing again.
        What is left behind stays in the session's tree."""
        if not 0 <= n <= len(conversation.responses):
            raise llm.ModelError(f"n is {n}, the conversation has {len(conversation.responses)} responses")
        conversation.responses[:] = conversation.responses[: len(conversation.responses) - n]

    def fork(self, conversation: llm.Conversation) -> llm.Conversation:
        """Another conversation that goes on from the same response, in a session that shares the past."""
        found = llm.Conversation(model=self)
        id, turn = self._place(conversation)
        if turn:
            self._server.post("/fork", session_id=id, turn=turn, new_session_id=_session_of(found))
            self._forks.add(found.id)
        found.responses = list(conversation.responses)
        return found

    def _place(self, conversation: llm.Conversation | None) -> tuple[str | None, int]:
        """The session of a conversation, and the number of the turn that the next one follows."""
        if conversation is None:
            return None, 0
        if not conversation.responses:  # llm loads those of its log as messages
            known = getattr(conversation, "loaded_messages", None) or ()
            return _session_of(conversation), sum(message.role == "user" for message in known)
        last = conversation.responses[-1]
        last.text()  # to its end, if it is still being read
        about = getattr(last, "response_json", None)
        if not isinstance(about, dict) or not about.get("session_id") or not about.get("turn"):
            raise llm.ModelError("the conversation's last response is of another model; start a new conversation")
        is_fork = conversation.id in self._forks
        return _session_of(conversation) if is_fork else about["session_id"], about["turn"]

    def _goes_to(self, id: str | None, turn: int) -> bool:
        """Makes a turn the head of a session; returns whether there is that session."""
        if id is None:
            return False
        try:
            head = self._server.get(f"/sessions/{id}")["head"]
        except Refused as error:
            if error.status != 404:
                raise
            if turn:
                raise llm.ModelError(f"the server has no session {id} any more; start a new conversation") from None
            return False
        if head != turn:
            self._server.post("/rollback", session_id=id, turn=turn)
        return True


def _session_of(conversation: llm.Conversation) -> str:
    """The session that is named after a conversation."""
    return f"llm-{conversation.id}"
