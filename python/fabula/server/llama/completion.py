"""`/completion` and `/infill` of llama.cpp's server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.engine.sampling import MAX_LOGPROBS, SamplingParams
from fabula.model import Model
from fabula.server.describe import LENDING, fails, streams
from fabula.server.failures import refuse
from fabula.server.llama.schemas import InfillBody, LlamaCompletionBody, Loose
from fabula.server.openai.format import Json, follow, line, pieces_of, start_generations, token_name
from fabula.server.runs import Event, Run
from fabula.server.start_run import begin, cancel_all, start_run
from fabula.server.state import Server, Serving, server
from fabula.server.stream import response
from fabula.text.fim import gap_prompt

routes = Blueprint("llama_completion", __name__)

MAX_PROMPTS = 64


@routes.post("/completion")
@streams
@tag(["llama.cpp"])
@validate_request(LlamaCompletionBody)
@document_response(Loose, 200)
@fails(*LENDING)
async def completion(data: LlamaCompletionBody) -> Any:
    """Continues a text, in llama.cpp's form."""
    state = server()
    serving = state.model_for(data.model)
    prompts, is_list = prompts_of(data.prompt)

    def encode(model: Model) -> tuple[list[list[int]], SamplingParams]:
        return [_ids(state, model, prompt, data.parse_special is not False) for prompt in prompts], _params(data)

    return await _answer(state, serving, data, encode, len(prompts), is_list=is_list)


@routes.post("/infill")
@streams
@tag(["llama.cpp"])
@validate_request(InfillBody)
@document_response(Loose, 200)
@fails(*LENDING)
async def infill(data: InfillBody) -> Any:
    """Fills the gap between a prefix and a suffix, for models that were trained for it."""
    state = server()
    serving = state.model_for(data.model)
    for name in ("input_prefix", "input_suffix", "prompt"):
        state.limits.check_text(getattr(data, name) or "", name)

    def encode(model: Model) -> tuple[list[list[int]], SamplingParams]:
        extra = [(one.filename, one.text) for one in data.input_extra or ()]
        gap = gap_prompt(model.tokenizer, data.input_prefix, data.input_suffix, extra=extra, begun=data.prompt or "")
        if gap is None:
            raise refuse("input_suffix", "needs a model with marks for gaps, such as Qwen2.5-Coder", "unsupported")
        params = _params(data)
        return [gap.ids], replace(params, stop_tokens=(*params.stop_tokens, *gap.ends))

    return await _answer(state, serving, data, encode, 1, is_list=False)


def prompts_of(given: Any) -> tuple[list[Any], bool]:
    """The prompts of a request, and whether they are a list of several."""
    if isinstance(given, str) or (isinstance(given, list) and given and any(isinstance(one, int) for one in given)):
        return [given], False
    if isinstance(given, list) and given and all(isinstance(one, str | list) and one for one in given):
        if len(given) > MAX_PROMPTS:
            raise refuse("prompt", f"holds {len(given)} prompts, at most {MAX_PROMPTS} are allowed")
        return given, True
    raise refuse("prompt", "must be a text, token ids, or a list of prompts")


def _ids(state: Server, model: Model, prompt: Any, special: bool) -> list[int]:
    """Token ids of a prompt that may mix texts and ids."""
    parts = prompt if isinstance(prompt, list) else [prompt]
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise refuse(f"prompt[{i}]", "must be a text or a token id")
        if isinstance(part, int):
            ids.append(part)
            continue
        state.limits.check_text(part, "prompt")
        ids += model.tokenizer.encode(part, special=special, add_bos=None if not i else False)
    return ids


def _params(data: LlamaCompletionBody | InfillBody) -> SamplingParams:
    n = data.n_probs or 0
    if not 0 <= n <= MAX_LOGPROBS:
        raise refuse("n_probs", f"is {n}, must be in 0 .. {MAX_LOGPROBS}")
    return replace(data.params(SamplingParams()), n_logprobs=n)


async def _answer(
    state: Server, serving: Serving, data: LlamaCompletionBody | InfillBody, encode: Any, n: int, *, is_list: bool
) -> Any:
    tenant, model = g.tenant, serving.model
    assert model is not None
    answers: LlamaAnswers

    def start() -> list[Generation]:
        prompts, params = encode(model)
        timeout = state.settings.answer_s
        return start_generations(model, prompts, params, 1, continues=True, tenant=tenant, timeout=timeout)

    def describe(index: int) -> Json:
        return answers.whole(index)

    generations = await begin(start, cancel_all, n)
    run = start_run(state, tenant, serving.name, generations, describe, partial_fails=True)
    answers = LlamaAnswers(data, serving, generations, run)
    if data.stream:
        return response(follow(run, answers.chunks, lambda: ()))
    found = await run.finish()
    return found if is_list else found[0]


class LlamaAnswers:
    """Writes the answers to a request as JSON.

    Args:
        data: the request.
        serving: the model.
        generations: the answers.
        run: generates them.
    """

    def __init__(
        self,
        data: LlamaCompletionBody | InfillBody,
        serving: Serving,
        generations: Sequence[Generation],
        run: Run,
    ) -> None:
        assert serving.model is not None
        self._data, self._name, self._generations, self._run = data, serving.name, generations, run
        self._tokenizer = serving.model.tokenizer

    def whole(self, index: int, *, is_streamed: bool = False) -> Json:
        """An answer that has ended; without its text at the end of a stream."""
        generation = self._generations[index]
        ids, text = generation.read_so_far()
        found: Json = {
            "index": index,
            "content": "" if is_streamed else text,
            "tokens": list(ids) if self._data.return_tokens and not is_streamed else [],
            "id_slot": -1,
            "stop": True,
            "model": self._name,
            "tokens_predicted": len(ids),
            "tokens_evaluated": len(generation.prompt_ids),
            "generation_settings": self._settings(generation),
            "prompt": self._tokenizer.decode(generation.prompt_ids, skip_special=False),
            "has_new_line": "\n" in text,
            "truncated": False,
            **self._end(generation, ids),
            "tokens_cached": generation.timings.reused_tokens,
            "timings": self._timings(generation),
        }
        if self._data.n_probs and not is_streamed:
            found["completion_probabilities"] = [self._entry(piece) for piece in pieces_of(self._run, index)]
        return found

    def _end(self, generation: Generation, ids: Sequence[int]) -> Json:
        """Why an answer ended."""
        if generation.finish_reason != "stop":
            return {"stop_type": "limit", "stopping_word": ""}
        is_eos = bool(ids) and ids[-1] in (*self._tokenizer.eos_ids, *generation.params.stop_tokens)
        stops = generation.params.stop
        word = stops[0] if not is_eos and len(stops) == 1 else ""
        return {"stop_type": "eos" if is_eos or not stops else "word", "stopping_word": word}

    def _settings(self, generation: Generation) -> Json:
        params = generation.params
        return {
            "n_predict": -1 if params.max_tokens is None else params.max_tokens,
            "seed": generation.seed,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "typical_p": params.typical_p,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": params.penalty_window,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "stop": list(params.stop),
            "ignore_eos": params.ignore_eos,
            "stream": bool(self._data.stream),
            "n_probs": params.n_logprobs,
        }

    def _timings(self, generation: Generation) -> Json:
        times = generation.timings
        n = times.prompt_tokens - times.reused_tokens
        decode_ms = max(0.0, times.total_ms - times.first_token_ms)
        return {
            "cache_n": times.reused_tokens,
            "prompt_n": n,
            "prompt_ms": times.prompt_ms,
            "prompt_per_token_ms": times.prompt_ms / n if n else 0.0,
            "prompt_per_second": times.prompt_tokens_per_s,
            "predicted_n": times.generated_tokens,
            "predicted_ms": decode_ms,
            "predicted_per_token_ms": decode_ms / times.generated_tokens if times.generated_tokens else 0.0,
            "predicted_per_second": times.tokens_per_s,
        }

    def _entry(self, piece: Piece) -> Json:
        """A token with its log-probability and the likeliest ones."""

        def about(token: int, logprob: float) -> Json:
            name, data = token_name(self._tokenizer, token), self._tokenizer.token_bytes(token)
            return {"id": token, "token": name, "bytes": list(data), "logprob": logprob}

        likeliest = [about(*one) for one in piece.top_logprobs]
        return about(piece.token_id, piece.logprob) | {"top_logprobs": likeliest}

    def chunks(self, event: Event) -> Iterator[bytes]:
        """The lines of an event."""
        index, piece = event.index, event.piece
        if piece is not None:
            generation = self._generations[index]
            found: Json = {
                "index": index,
                "content": piece.text,
                "tokens": [piece.token_id],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": len(generation.token_ids),
                "tokens_evaluated": len(generation.prompt_ids),
            }
            if self._data.n_probs:
                found["completion_probabilities"] = [self._entry(piece)]
            yield line(found)
        elif event.kind == "error":
            yield line(event.data or {})
        elif event.kind != "start":
            yield line(self.whole(index, is_streamed=True))
