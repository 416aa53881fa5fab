"""What the answers of OpenAI's API have in common: names, token counts, probabilities, the lines of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fabula.engine.constraint import Constraint
from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.model import Model
from fabula.server.failures import ApiError
from fabula.server.openai.schemas import MAX_CHOICES, Asked
from fabula.server.runs import Event, Follower, Run
from fabula.server.stream import KEEP_ALIVE, dumps
from fabula.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]


def refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 about a field."""
    return ApiError(400, code, f"{param} {message}", param=param)


# ---- Beginning ------------------------------------------------------------------------------------------------------


def choices_of(data: Asked) -> int:
    """How many answers a prompt gets."""
    n = 1 if data.n is None else data.n
    if not 1 <= n <= MAX_CHOICES:
        raise refuse("n", f"is {n}, must be in 1 .. {MAX_CHOICES}")
    return n


def schema_constraint(schema: Json | None, strict: bool | None, where: str) -> Constraint:
    """The constraint of a schema; without `strict`, a keyword that cannot be enforced is passed over."""
    if schema is None:
        raise refuse(where, "is missing", "missing_field")
    if not strict and "x-guidance" not in schema:
        schema = {**schema, "x-guidance": {"lenient": True}}
    return Constraint.json_schema(schema)


def start_generations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    *,
    continues: bool,
    tenant: str,
    timeout: float,
) -> list[Generation]:
    """Starts n answers to each prompt. Seed s gives the seeds s, s + 1, ... Blocks."""
    made: list[Generation] = []
    try:
        for prompt in prompts:
            for i in range(n):
                one = params if params.seed is None else replace(params, seed=(params.seed + i) % 2**64)
                made.append(Generation(model._engine, prompt, one, continues=continues, salt=tenant, timeout=timeout))
    except BaseException:
        for generation in made:
            generation.abandon()
        raise
    return made


# ---- What is told ---------------------------------------------------------------------------------------------------


def fingerprint(model: Model) -> str:
    """Changes with everything an answer of a seed depends on, the settings aside."""
    return f"fp_{model.fingerprint.key[:16]}"


def reason_of(reason: str | None) -> str:
    """OpenAI's word for how an answer ended. One that was cancelled or out of time was cut off: "length"."""
    return "stop" if reason == "stop" else "length"


def ended_itself(generation: Generation, *, has_stops: bool) -> bool:
    """Whether the model ended an answer: it was not cut off, by a stop string neither."""
    if generation.finish_reason != "stop":
        return False
    ids = generation.token_ids
    return not has_stops or (bool(ids) and ids[-1] in generation.engine.tokenizer.eos_ids)


def usage(generations: Sequence[Generation], n: int) -> Json:
    """Tokens of answers, n to a prompt; a prompt counts once, and as cached what its first answer found."""
    firsts = [generation.timings for generation in generations[::n]]
    prompt = sum(one.prompt_tokens for one in firsts)
    answer = sum(generation.timings.generated_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in firsts)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def pieces_of(run: Run, index: int) -> list[Piece]:
    """What was read of one of a run's answers, up to where its text ends."""
    pieces = [event.piece for event in run.events if event.piece is not None and event.index == index]
    return pieces[: pieces[-1].n_certain] if pieces else []


class CertainPieces:
    """Takes the pieces of an answer one after the other and gives each back as soon as its token is certain to be part
    of the text: while a stop string is held back, none of its tokens; behind the cut, never."""

    def __init__(self) -> None:
        self._waiting: deque[Piece] = deque()
        self._n_given = 0

    def feed(self, piece: Piece) -> list[Piece]:
        """The pieces that became certain with this one."""
        self._waiting.append(piece)
        found = [self._waiting.popleft() for _ in range(piece.n_certain - self._n_given)]
        self._n_given = piece.n_certain
        return found


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; half a character becomes U+FFFD, a control token is written out."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace") or tokenizer.token_text(token_id)


def chat_logprob(tokenizer: Tokenizer, piece: Piece) -> Json:
    """A token's probability and those of the likeliest, as chat tells them."""

    def told(token_id: int, logprob: float) -> Json:
        return {
            "token": token_name(tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return told(piece.token_id, piece.logprob) | {"top_logprobs": [told(*one) for one in piece.top_logprobs]}


# ---- Streams --------------------------------------------------------------------------------------------------------


def follow(
    run: Run, told: Callable[[Event], Iterable[bytes]], last: Callable[[], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    """A run as a stream: `told` makes the lines of an event, `last` those at the end."""
    return _follow(run, run.follow(), told, last)


async def _follow(
    run: Run, follower: Follower, told: Callable[[Event], Iterable[bytes]], last: Callable[[], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    try:
        async for events in follower:
            lines = b"".join([line for _, event in events for line in told(event)])
            if lines or not events:
                yield lines or KEEP_ALIVE
        if run.is_done:
            yield b"".join(last())
    finally:
        follower.close()


def line(data: Json) -> bytes:
    """A line of chat's streams."""
    return f"data: {dumps(data)}\n\n".encode()
