"""Writes an answer as a message of Anthropic's API, whole or as its events.

The sequence of a stream (Anthropic, "Streaming messages"): message_start; for each block content_block_start, some
content_block_delta, content_block_stop; message_delta with the reason of the end and the token counts; message_stop.
Pings come at the start and while nothing else does; an error ends the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fabula.engine.generation import Generation
from fabula.server.anthropic.blocks import Blocks
from fabula.server.anthropic.errors import error_json
from fabula.server.borrowed import Json
from fabula.server.failures import INTERNAL
from fabula.server.openai.format import ended_itself
from fabula.server.reasoning import AnswerParser, n_thought_tokens
from fabula.server.runs import Event, Run
from fabula.server.stop_string import stop_string_of
from fabula.server.stream import dumps


def sse(data: Json) -> bytes:
    """An event of a stream."""
    return f"event: {data['type']}\ndata: {dumps(data)}\n\n".encode()


PING = sse({"type": "ping"})


class MessageWriter:
    """Writes one answer.

    Args:
        model: name of the model that answers.
        generation: the answer.
        run: generates it.
        parser: makes a parser of its text.
        thoughts: as `Blocks` takes it.
    """

    def __init__(
        self, model: str, generation: Generation, run: Run, parser: Callable[[], AnswerParser], thoughts: str
    ) -> None:
        self._generation, self._run, self._new_parser, self._thoughts = generation, run, parser, thoughts
        key = run.id.removeprefix("run_")
        self._key = "".join(c for c in key if c.isalnum())
        self._about: Json = {"id": f"msg_{self._key}", "type": "message", "role": "assistant", "model": model}
        self._parser, self._blocks = parser(), Blocks(self._key, thoughts)

    def whole(self) -> Json:
        """The message after its end."""
        generation, parser, blocks = self._generation, self._new_parser(), Blocks(self._key, self._thoughts)
        events = parser.feed(generation.read_so_far()[1])
        for _ in (*blocks.take([*events, *parser.finish(is_whole=self._ended_itself())]), *blocks.finish()):
            pass
        reason, stop = self._reason(blocks)
        end = {"content": blocks.items, "stop_reason": reason, "stop_sequence": stop}
        return self._about | end | {"usage": self._usage()}

    def events(self, event: Event) -> Iterator[bytes]:
        """The bytes of a run's event."""
        if event.kind == "start":
            start: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
            yield sse({"type": "message_start", "message": self._about | start})
            yield PING
        elif event.piece is not None:
            for one in self._blocks.take(self._parser.feed(event.piece.text)):
                yield sse(one)
        elif event.kind == "error":
            yield sse(error_json(self._run.error or INTERNAL))
        else:
            rest = self._parser.finish(is_whole=self._ended_itself())
            for one in (*self._blocks.take(rest), *self._blocks.finish()):
                yield sse(one)
            whole = event.data or {}
            delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
            yield sse({"type": "message_delta", "delta": delta, "usage": whole["usage"]})
            yield sse({"type": "message_stop"})

    def _ended_itself(self) -> bool:
        return ended_itself(self._generation, has_stops=bool(self._generation.params.stop))

    def _reason(self, blocks: Blocks) -> tuple[str, str | None]:
        """Why the answer ended, and the stop string if one ended it."""
        generation = self._generation
        if generation.finish_reason != "stop":
            most, n = generation.params.max_tokens, generation.timings.generated_tokens
            is_full = generation.finish_reason == "length" and (most is None or n < most)
            return ("model_context_window_exceeded" if is_full else "max_tokens"), None
        stop = None if self._ended_itself() else stop_string_of(self._generation)
        if stop is not None:
            return "stop_sequence", stop
        return ("tool_use" if blocks.calls_are_whole else "end_turn"), None

    def _usage(self) -> Json:
        timings = self._generation.timings
        more = (
            {"output_tokens_details": {"thinking_tokens": n_thought_tokens(self._generation)}} if self._thoughts else {}
        )
        return {
            "input_tokens": timings.prompt_tokens - timings.reused_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": timings.reused_tokens,
            "output_tokens": timings.generated_tokens,
        } | more
