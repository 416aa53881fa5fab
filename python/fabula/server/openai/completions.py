"""`/v1/completions`: continues texts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.server.describe import WRITING, fails, streams
from fabula.server.failures import refuse
from fabula.server.openai.format import (
    DONE,
    CertainPieces,
    Json,
    choices_of,
    fingerprint,
    follow,
    line,
    pieces_of,
    reason_of,
    start_generations,
    token_name,
    usage,
)
from fabula.server.openai.params import completion_params
from fabula.server.openai.replies import CompletionReply
from fabula.server.openai.schemas import CompletionBody
from fabula.server.runs import Event, Run
from fabula.server.start_run import begin, cancel_all, start_run
from fabula.server.state import Server, Serving, server
from fabula.server.stream import response

routes = Blueprint("openai_completions", __name__)

Prompt = str | list[int]


@routes.post("/v1/completions")
@streams
@tag(["OpenAI"])
@validate_request(CompletionBody)
@document_response(CompletionReply, 200)
@fails(*WRITING)
async def completions(data: CompletionBody) -> Any:
    """Continues texts. `max_tokens` is 16 unless it is given."""
    state, tenant = server(), g.tenant
    n, prompts = choices_of(data), prompts_of(data)
    serving = state.model_for(data.model)
    texts: Texts

    def describe(index: int) -> Json:
        return texts.choice(index)

    generations = await begin(lambda: _begin(state, serving, tenant, data, prompts, n), cancel_all, n * len(prompts))
    run = start_run(state, tenant, serving.name, generations, describe)
    texts = Texts(data, serving, prompts, n, generations, run)
    if data.stream:
        return response(follow(run, texts.chunks, texts.last))
    choices = await run.finish()
    return texts.about() | {"choices": choices, "usage": usage(generations, n)}


def prompts_of(data: CompletionBody) -> list[Prompt]:
    """The prompts of a request: texts or token ids."""
    given: Any = data.prompt
    prompts: list[Prompt] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not prompts or not all(prompts):
        raise refuse("prompt", "is empty; give a text or tokens to continue")
    return prompts


def _begin(
    state: Server, serving: Serving, tenant: str, data: CompletionBody, prompts: list[Prompt], n: int
) -> list[Generation]:
    """Reads the request and starts its answers; blocks."""
    model = serving.model
    assert model is not None
    params = completion_params(data, n)
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            state.limits.check_text(prompt, "prompt")
            ids.append(model.tokenizer.encode(prompt, special=data.parse_special is not False))
        else:
            ids.append(prompt)
    timeout = state.settings.answer_s
    return start_generations(model, ids, params, n, continues=True, tenant=tenant, timeout=timeout)


class Texts:
    """Writes the answers to a request as JSON.

    Args:
        data: the request.
        serving: the model.
        prompts: texts or ids.
        n: answers to each.
        generations: the answers, those to a prompt side by side.
        run: generates them.
    """

    def __init__(
        self,
        data: CompletionBody,
        serving: Serving,
        prompts: list[Prompt],
        n: int,
        generations: list[Generation],
        run: Run,
    ) -> None:
        assert serving.model is not None
        self._data, self._prompts, self._n, self._generations, self._run = data, prompts, n, generations, run
        self._tokenizer = serving.model.tokenizer
        self._common: Json = {
            "id": "cmpl-" + run.id.removeprefix("run_"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": serving.name,
            "system_fingerprint": fingerprint(serving.model),
        }
        self._certain = [CertainPieces() for _ in generations]
        self._wants_usage = bool(data.stream_options and data.stream_options.include_usage)

    def about(self) -> Json:
        """The first fields of every object."""
        return dict(self._common)

    def _echo(self, index: int) -> str:
        """The text in front of an answer."""
        if not self._data.echo:
            return ""
        prompt = self._prompts[index // self._n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def choice(self, index: int) -> Json:
        """An answer that has ended."""
        generation = self._generations[index]
        text = self._echo(index) + generation.read_so_far()[1]
        logprobs = self._logprobs(pieces_of(self._run, index))
        reason = reason_of(generation.finish_reason)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, pieces: list[Piece]) -> Json | None:
        """Tokens with their probabilities. `text_offset` counts characters from the answer's beginning to where the
        token begins; tokens that share a character have the offset of that character."""
        if self._data.logprobs is None:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            found["tokens"].append(token_name(self._tokenizer, piece.token_id))
            found["token_logprobs"].append(piece.logprob)
            found["text_offset"].append(piece.offset)
            found["top_logprobs"].append(
                {token_name(self._tokenizer, token): logprob for token, logprob in piece.top_logprobs} or None
            )
        return found

    # ---- Streamed ---------------------------------------------------------------------------------------------------

    def chunks(self, event: Event) -> Iterator[bytes]:
        """The lines of an event."""
        index, piece = event.index, event.piece
        if event.kind == "start":
            for one in range(len(self._generations)):
                if self._data.echo:
                    yield self._chunk(one, self._echo(one))
        elif piece is not None:
            logprobs = self._logprobs(self._certain[index].feed(piece))
            if piece.text or (logprobs is not None and logprobs["tokens"]):
                yield self._chunk(index, piece.text, logprobs=logprobs)
        elif event.kind == "error":
            yield line(event.data or {})
        else:
            yield self._chunk(index, "", reason=(event.data or {})["finish_reason"])

    def _chunk(self, index: int, text: str, *, logprobs: Json | None = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = self.about() | {"choices": [choice]}
        return line(chunk | {"usage": None} if self._wants_usage else chunk)

    def last(self) -> Iterator[bytes]:
        """The lines at the end."""
        if self._wants_usage:
            yield line(self.about() | {"choices": [], "usage": usage(self._generations, self._n)})
        yield DONE
