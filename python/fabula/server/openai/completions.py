"""`/v1/completions`: continues texts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation, Timings
from fabula.model import Model
from fabula.server.describe import LENDING, fails, streams
from fabula.server.failures import refuse
from fabula.server.openai.echo import prompt_pieces
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
from fabula.text.fim import Gap, gap_prompt

routes = Blueprint("openai_completions", __name__)

Prompt = str | list[int]


@routes.post("/v1/completions")
@streams
@tag(["OpenAI"])
@validate_request(CompletionBody)
@document_response(CompletionReply, 200)
@fails(*LENDING)
async def completions(data: CompletionBody) -> Any:
    """Continues texts. `max_tokens` is 16 unless it is given."""
    state, tenant = server(), g.tenant
    n, prompts = choices_of(data), prompts_of(data)
    serving = state.model_for(data.model)
    texts: Texts

    def describe(index: int) -> Json:
        return texts.choice(index)

    is_echo_alone = bool(data.echo) and data.max_tokens == 0
    if is_echo_alone:
        data = data.model_copy(update={"max_tokens": 1})  # of which nothing is told
    generations, echoes = await begin(
        lambda: _begin(state, serving, tenant, data, prompts, n), lambda made: cancel_all(made[0]), n * len(prompts)
    )
    run = start_run(state, tenant, serving.name, generations, describe, partial_fails=True)
    texts = Texts(data, serving, prompts, n, generations, run, echoes, is_echo_alone=is_echo_alone)
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
) -> tuple[list[Generation], list[list[Piece]]]:
    """Reads the request and starts its answers; also returns the tokens of each prompt, if asked for. Blocks."""
    model = serving.model
    assert model is not None
    params = completion_params(data, n)
    special, tokenizer = data.parse_special is not False, model.tokenizer
    ids: list[list[int]] = []
    echoes: list[list[Piece]] = []
    for prompt in prompts:
        n_hidden = 0
        if isinstance(prompt, str):
            state.limits.check_text(prompt, "prompt")
            ids.append(tokenizer.encode(prompt, special=special))
            n_hidden = len(ids[-1]) - len(tokenizer.encode(prompt, special=special, add_bos=False))
        else:
            ids.append(prompt)
        if data.suffix:
            gap = _gap(state, model, prompt, data.suffix)
            ids[-1] = gap.ids
            params = replace(params, stop_tokens=(*params.stop_tokens, *gap.ends))
        if data.echo and data.logprobs is not None:
            skip = not isinstance(prompt, str)
            found = prompt_pieces(model, ids[-1], data.logprobs, skip_special=skip, n_hidden=n_hidden)
            state.limits.pay(tenant, Timings(len(found), 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
            echoes.append(found)
    timeout = state.settings.answer_s
    made = start_generations(model, ids, params, n, continues=True, tenant=tenant, timeout=timeout)
    return made, echoes


def _gap(state: Server, model: Model, prompt: Prompt, suffix: str) -> Gap:
    """The prompt for the text between prompt and suffix."""
    state.limits.check_text(suffix, "suffix")
    if not isinstance(prompt, str):
        raise refuse("suffix", "needs a text as prompt, not token ids", "unsupported")
    gap = gap_prompt(model.tokenizer, prompt, suffix)
    if gap is None:
        raise refuse("suffix", "needs a model with marks for gaps, such as Qwen2.5-Coder", "unsupported")
    return gap


class Texts:
    """Writes the answers to a request as JSON.

    Args:
        data: the request.
        serving: the model.
        prompts: texts or ids.
        n: answers to each.
        generations: the answers, those to a prompt side by side.
        run: generates them.
        echoes: the tokens of each prompt; empty if they are not asked for.
        is_echo_alone: whether only the prompt is told.
    """

    def __init__(
        self,
        data: CompletionBody,
        serving: Serving,
        prompts: list[Prompt],
        n: int,
        generations: list[Generation],
        run: Run,
        echoes: list[list[Piece]],
        *,
        is_echo_alone: bool,
    ) -> None:
        assert serving.model is not None
        self._data, self._prompts, self._n, self._generations, self._run = data, prompts, n, generations, run
        self._echoes, self._is_echo_alone = echoes, is_echo_alone
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
        text, pieces = self._echo(index), pieces_of(self._run, index)
        if self._is_echo_alone:
            pieces = []
        else:
            text += generation.read_so_far()[1]
        logprobs = self._logprobs([*self._echoed(index), *self._shifted(index, pieces)])
        reason = reason_of(generation.finish_reason)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _echoed(self, index: int) -> list[Piece]:
        """The tokens of an answer's prompt, if they are told."""
        return self._echoes[index // self._n] if self._echoes else []

    def _shifted(self, index: int, pieces: list[Piece]) -> list[Piece]:
        """Pieces of an answer with their offsets after those of the prompt."""
        n = len(self._echo(index)) if self._echoes else 0
        return [replace(piece, offset=piece.offset + n) for piece in pieces] if n else pieces

    def _logprobs(self, pieces: list[Piece]) -> Json | None:
        """Tokens with their probabilities. `text_offset` counts characters from the answer's beginning to where the
        token begins; tokens that share a character have the offset of that character."""
        if self._data.logprobs is None:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            found["tokens"].append(token_name(self._tokenizer, piece.token_id))
            found["token_logprobs"].append(None if math.isnan(piece.logprob) else piece.logprob)
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
                    echoed = self._echoed(one)
                    yield self._chunk(one, self._echo(one), logprobs=self._logprobs(echoed) if echoed else None)
        elif piece is not None and not self._is_echo_alone:
            logprobs = self._logprobs(self._shifted(index, self._certain[index].feed(piece)))
            if piece.text or (logprobs is not None and logprobs["tokens"]):
                yield self._chunk(index, piece.text, logprobs=logprobs)
        elif event.kind == "error":
            yield line(event.data or {})
        elif piece is None:
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
