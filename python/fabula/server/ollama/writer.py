"""Writes an answer in the form of Ollama's API, whole or as lines of JSON."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.server.borrowed import Json
from fabula.server.failures import INTERNAL
from fabula.server.ollama.errors import error_json
from fabula.server.openai.format import CertainPieces, chat_logprob, ended_itself, pieces_of
from fabula.server.reasoning import AnswerParser, ReasoningText
from fabula.server.runs import Event, Run
from fabula.server.stream import dumps
from fabula.sessions.call_events import Arguments, CallEnded, CallStarted, Content, loaded
from fabula.sessions.call_events import Event as Part


def line(data: Json) -> bytes:
    """A line of a stream."""
    return f"{dumps(data)}\n".encode()


def now() -> str:
    """The time as Ollama writes it."""
    return rfc3339(datetime.datetime.now(datetime.UTC))


def rfc3339(time: datetime.datetime) -> str:
    """A time in UTC."""
    return time.isoformat().replace("+00:00", "Z")


class Parts:
    """Collects the parts of an answer into pieces of a message.

    Args:
        key: part of the ids of its tool calls.
    """

    def __init__(self, key: str) -> None:
        self._key, self._name, self._arguments, self._n_calls = key, "", "", 0

    def take(self, events: Iterable[Part | ReasoningText]) -> Iterator[Json]:
        """Pieces for these events; a call is one piece, as soon as it is complete. One that is not is text."""
        for event in events:
            match event:
                case ReasoningText(text):
                    yield {"thinking": text}
                case Content(text):
                    yield {"content": text}
                case CallStarted(_, name):
                    self._name, self._arguments = name, ""
                case Arguments(_, text):
                    self._arguments += text
                case CallEnded(_, is_valid, raw):
                    arguments = loaded(self._arguments) if is_valid else None
                    yield {"content": raw} if arguments is None else {"tool_calls": [self._call(arguments)]}

    def _call(self, arguments: Json) -> Json:
        index, self._n_calls = self._n_calls, self._n_calls + 1
        function = {"index": index, "name": self._name, "arguments": arguments}
        return {"id": f"call_{self._key}_{index}", "function": function}


def joined(pieces: Iterable[Json]) -> Json:
    """One message of its pieces."""
    found: Json = {"content": ""}
    for piece in pieces:
        for name, value in piece.items():
            found[name] = found[name] + value if name in found else value
    return found


class AnswerWriter:
    """Writes one answer.

    Args:
        model: name of the model that answers.
        generation: the answer.
        run: generates it.
        parser: makes a parser of its text.
        shaped: makes the fields of a reply from a piece of the message.
        logprobs: whether log-probabilities are sent.
        more: further fields of the last line; called at the end.
    """

    def __init__(
        self,
        model: str,
        generation: Generation,
        run: Run,
        parser: Callable[[], AnswerParser],
        shaped: Callable[[Json], Json],
        more: Callable[[Generation], Json] = lambda _: {},
        *,
        logprobs: bool = False,
    ) -> None:
        self._model, self._generation, self._run, self._new_parser = model, generation, run, parser
        self._shaped, self._more, self._logprobs = shaped, more, logprobs
        self._certain = CertainPieces()
        self._key = "".join(c for c in run.id.removeprefix("run_") if c.isalnum())[-12:]
        self._parser, self._parts = parser(), Parts(self._key)

    def whole(self) -> Json:
        """The reply after the answer's end."""
        parser, parts = self._new_parser(), Parts(self._key)
        events = parser.feed(self._generation.read_so_far()[1])
        pieces = parts.take([*events, *parser.finish(is_whole=self._ended_itself())])
        return self._about(joined(pieces)) | self._told(pieces_of(self._run, 0)) | self._end()

    def lines(self, event: Event) -> Iterator[bytes]:
        """The lines of a run's event."""
        if event.piece is not None:
            told = self._told(self._certain.feed(event.piece)) if self._logprobs else {}
            pieces = [*self._parts.take(self._parser.feed(event.piece.text))] or ([{}] if told else [])
            for i, piece in enumerate(pieces):
                yield line(self._about(piece) | (told if i == 0 else {}) | {"done": False})
        elif event.kind == "error":
            yield line(error_json(self._run.error or INTERNAL))
        elif event.kind != "start":
            rest = self._parser.finish(is_whole=self._ended_itself())
            for piece in self._parts.take(rest):
                yield line(self._about(piece) | {"done": False})
            yield line(self._about({}) | self._end())

    def _told(self, pieces: list[Piece]) -> Json:
        """Log-probabilities of tokens, if they are wanted."""
        tokenizer = self._generation.engine.tokenizer
        return {"logprobs": [chat_logprob(tokenizer, piece) for piece in pieces]} if self._logprobs and pieces else {}

    def _ended_itself(self) -> bool:
        return ended_itself(self._generation, has_stops=bool(self._generation.params.stop))

    def _about(self, piece: Json) -> Json:
        return {"model": self._model, "created_at": now()} | self._shaped({"content": ""} | piece)

    def _end(self) -> Json:
        """The last fields, with token counts and durations in nanoseconds."""
        generation = self._generation
        timings = generation.timings
        return {
            "done": True,
            "done_reason": "stop" if generation.finish_reason == "stop" else "length",
            **self._more(generation),
            "total_duration": _ns(timings.total_ms),
            "load_duration": 0,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": _ns(timings.prompt_ms),
            "eval_count": timings.generated_tokens,
            "eval_duration": _ns(timings.total_ms - timings.first_token_ms),
        }


def _ns(ms: float) -> int:
    """Milliseconds as nanoseconds; at least 1, since clients divide by it."""
    return max(1, round(1e6 * ms))
