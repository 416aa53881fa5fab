"""Accuracy of precisions: each format's perplexity and distance from a reference, compared with llama.cpp.

All formats are in memory and process a window before any continues with the next, so that only the logits of one window
are held: the reference's and one format's. llama.cpp gets the same ids and a file of the same weights, and also starts
each window with an empty cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fabula.bench.perplexity import DEFAULT_WINDOW, F32, Tally, windows_of
from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.errors import EngineError
from fabula.model import Model


class Reader(Protocol):
    """Another engine on a model's weights.

    Attributes:
        name, settings: for the table; the settings of "prefill".
    """

    name: str
    settings: dict[str, str]

    def logits(self, tokens: Sequence[int]) -> F32:
        """Logits after each token except the last, starting with an empty cache."""
        ...

    def close(self) -> None: ...


# (model, tokens per window) -> another engine on that model; None if there is none.
MakeReader = Callable[[Model, int], Reader | None]


def bench_accuracy(
    models: Sequence[Model],
    text: str,
    *,
    window: int = DEFAULT_WINDOW,
    reference: int | None = None,
    make_peer: MakeReader | None = None,
    file: str | None = None,
    status: Status = silent,
) -> list[Row]:
    """Measures loaded models on a text, one row each.

    Args:
        models: one model in several precisions; left open.
        window: tokens per window, without the start token.
        reference: index of the model that the others are compared with; None for none.
        make_peer: opens another engine for each model; None for none.
        file: source of the text, for the rows.
        status: callback for progress.

    Raises:
        InvalidArgument: the text is too short, or the window out of range.
        EngineError: the other engine fails.
    """
    windows = windows_of(models[0], text, window)
    tallies, theirs = [Tally() for _ in models], [Tally() for _ in models]
    peers: list[Reader | None] = []
    try:
        for model in models:
            peers.append(make_peer(model, max(map(len, windows))) if make_peer else None)
        for i, tokens in enumerate(windows):
            status(f"window {i + 1} of {len(windows)}")
            targets = np.asarray(tokens[1:])
            expected = None if reference is None else models[reference].logits(tokens)[:-1]
            for j, model in enumerate(models):
                logits = expected if j == reference and expected is not None else model.logits(tokens)[:-1]
                tallies[j].add(logits, targets, expected)
                if (peer := peers[j]) is not None:
                    found = peer.logits(tokens)
                    if found.shape != logits.shape:
                        raise EngineError(f"{peer.name}: has a vocabulary of {found.shape[1]}, not {logits.shape[1]}")
                    theirs[j].add(found, targets, expected)
    finally:
        for peer in peers:
            if peer is not None:
                peer.close()
    compared = None if reference is None else models[reference].weights
    base = None if reference is None else tallies[reference].perplexity
    about = {"file": file, "window": window, "n_windows": len(windows), "compare": compared}
    return [
        _row(model, about, base, tally, peer, their)
        for model, tally, peer, their in zip(models, tallies, peers, theirs, strict=True)
    ]


def beyond(rows: Sequence[Row], percent: float) -> list[str]:
    """A message for each format whose perplexity differs by more than `percent`, or was not compared."""
    lines = []
    for row in rows:
        difference = row.more["difference_to_peer"]
        if difference is None:
            lines.append(f"{row.weights}: not compared with another engine")
        elif not 100 * abs(difference) <= percent:
            lines.append(
                f"{row.weights}: perplexity {row.ours:.4f} is {difference:+.3%} from {row.peer_name}'s {row.peer:.4f}, "
                f"allowed are {percent:g} %; standard error {row.more['difference_to_peer_error'] or 0:.3%}"
            )
    return lines


def _row(
    model: Model, about: dict[str, Any], base: float | None, tally: Tally, peer: Reader | None, theirs: Tally
) -> Row:
    found = theirs.perplexity if peer else None
    more = {
        **about,
        "n_tokens": tally.n_tokens,
        **_distances("", tally, base),
        "difference_to_peer": tally.perplexity / found - 1 if found else None,
        "difference_to_peer_error": tally.error_to(theirs) if found else None,
        **_distances("peer_", theirs if peer else None, base),
    }
    return Row(
        case="perplexity",
        model=model.path.name,
        weights=model.weights,
        kv=model.kv,
        threads=model.threads,
        unit="perplexity",
        ours=tally.perplexity,
        peer=found,
        peer_name=peer.name if peer else None,
        peer_settings=peer.settings["prefill"] if peer else None,
        more=more,
    )


def _distances(prefix: str, tally: Tally | None, base: float | None) -> dict[str, float | None]:
    """Distances from the reference: relative difference of perplexity, divergence in nats, share of same top token."""
    values: dict[str, float | None] = dict.fromkeys(("relative_difference", "kl_mean", "kl_max", "same_top"))
    if tally is not None and base is not None:
        values["relative_difference"] = tally.perplexity / base - 1
        values["kl_mean"], values["kl_max"] = tally.divergence_mean, tally.divergence_max
        values["same_top"] = tally.n_same / tally.n_tokens
    return {prefix + name: value for name, value in values.items()}
