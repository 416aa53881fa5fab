"""Log-probabilities of a prompt's own tokens, for `echo` with `logprobs` in `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fabula.engine.decoding import Piece, likeliest, log_sum_exp
from fabula.model import Model

STEP_TOKENS = 64  # of a step: the logits of 150,000 tokens for each take 40 MB


def prompt_pieces(model: Model, ids: Sequence[int], n: int, *, skip_special: bool, n_hidden: int = 0) -> list[Piece]:
    """A prompt's tokens as pieces, with the log-probability of each after those before it; that of the first, which
    follows nothing, is NaN. Blocks, in steps between which others run. Nothing is taken from a cache.

    Args:
        model: that scores them.
        ids: of the prompt.
        n: likeliest tokens to report with each.
        skip_special: whether control tokens have no text.
        n_hidden: tokens at the start that have none, as they were added to the text.

    Raises:
        InvalidArgument, ContextOverflow: as `Model.generate`.
        OutOfMemory: there are no free pages.
    """
    runner = model._engine.runner
    runner.check_head()
    tokens = runner.token_ids(ids)
    runner.check_room(len(tokens))
    decoder = model.tokenizer.stream_decoder(skip_special=skip_special)
    pieces: list[Piece] = []
    logprob, top, offset = float("nan"), tuple[tuple[int, float], ...](), 0
    with runner.sequence() as sequence:
        for start in range(0, len(tokens), STEP_TOKENS):
            share = tokens[start : start + STEP_TOKENS]
            logits = runner.step([(sequence, share)], np.arange(len(share)))
            for i, token in enumerate(share.tolist()):
                text = decoder.push(token) if start + i >= n_hidden else ""
                pieces.append(Piece(token, text, logprob, None, top, offset, start + i + 1))
                offset += len(text)
                if start + i + 1 < len(tokens):
                    following = int(tokens[start + i + 1])
                    logprob = float(logits[i][following]) - log_sum_exp(logits[i])
                    top = likeliest(logits[i], n)
    return pieces
