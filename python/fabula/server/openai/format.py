"""Shared by the routes of OpenAI's API: names, token counts, probabilities, the lines of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.model import Model
from fabula.server.failures import refuse
from fabula.server.openai.schemas import MAX_CHOICES, Asked
from fabula.server.reasoning import n_thought_tokens
from fabula.server.runs import Event, Follower, Run
from fabula.server.stream import KEEP_ALIVE, dumps
from fabula.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]


# ---- Starting -------------------------------------------------------------------------------------------------------


def choices_of(data: Asked) -> int:
    """Number of answers to each prompt."""
    n = 1 if data.n is None else data.n
    if not 1 <= n <= MAX_CHOICES:
        raise refuse("n", f"is {n}, must be in 1 .. {MAX_CHOICES}")
    return n


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


# ---- JSON ----------------------------------------------------------------------------------------------------------


def fingerprint(model: Model) -> str:
    """Fingerprint of everything but the settings that a seeded answer depends on."""
    return f"fp_{model.fingerprint.key[:16]}"


def reason_of(reason: str | None) -> str:
    """OpenAI's finish reason of an answer that is complete, or as long as it was asked to be; others are errors."""
    return "stop" if reason == "stop" else "length"


def ended_itself(generation: Generation, *, has_stops: bool) -> bool:
    """Whether the model ended an answer itself: it was not truncated, nor cut at a stop string."""
    if generation.finish_reason != "stop":
        return False
    ids = generation.token_ids
    return not has_stops or (bool(ids) and ids[-1] in generation.engine.tokenizer.eos_ids)


def usage(generations: Sequence[Generation], n: int) -> Json:
    """Token counts of answers, n to a prompt. A prompt counts once; cached tokens are those of its first answer."""
    firsts = [generation.timings for generation in generations[::n]]
    prompt = sum(one.prompt_tokens for one in firsts)
    answer = sum(generation.timings.generated_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(map(n_thought_tokens, generations))},
    }


def pieces_of(run: Run, index: int) -> list[Piece]:
    """The pieces of one of a run's answers, up to the end of its text."""
    pieces = [event.piece for event in run.events if event.piece is not None and event.index == index]
    return pieces[: pieces[-1].n_certain] if pieces else []


class CertainPieces:
    """Holds back each piece of an answer until its token is certain to be part of the text: tokens of a possible stop
    string wait, and those after the cut never come."""

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
    """A token as text. Half a character becomes U+FFFD; a control token is its name."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace") or tokenizer.token_text(token_id)


def chat_logprob(tokenizer: Tokenizer, piece: Piece) -> Json:
    """Log-probabilities of a token and of the likeliest ones, in chat's form."""

    def entry(token_id: int, logprob: float) -> Json:
        return {
            "token": token_name(tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return entry(piece.token_id, piece.logprob) | {"top_logprobs": [entry(*one) for one in piece.top_logprobs]}


# ---- Streams --------------------------------------------------------------------------------------------------------


def follow(
    run: Run, encode: Callable[[Event], Iterable[bytes]], last: Callable[[], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    """A run as a stream: `encode` makes the lines of an event, `last` those at the end."""
    return _follow(run, run.follow(), encode, last)


async def _follow(
    run: Run, follower: Follower, encode: Callable[[Event], Iterable[bytes]], last: Callable[[], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    try:
        async for events in follower:
            lines = b"".join([line for _, event in events for line in encode(event)])
            if lines or not events:
                yield lines or KEEP_ALIVE
        if run.is_done:
            yield b"".join(last())
    finally:
        follower.close()


def line(data: Json) -> bytes:
    """A line of chat's streams."""
    return f"data: {dumps(data)}\n\n".encode()
