"""A story longer than the context: speed, pages and perplexity per 1,000 tokens, with a sliding window.

    python benchmarks/long_story.py [--model NAME] [--tokens N] [--window W] [--json]
    python benchmarks/long_story.py --text FILE [--window W]    reads a text, four times over, instead of telling one

Perplexity is that of the model's own text under the plain softmax of its own logits: what it would climb if the model
lost the thread once the beginning is gone. Tokens are sampled from the full distribution (temperature 1): a small model
that is made to take what is likely soon repeats a sentence for ever, at a perplexity of 1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fabula import ContextPolicy, Model, SamplingParams
from fabula.kv.prefix import Window

EVERY = 1000


def read(model: Model, path: Path, window: Window) -> Iterator[dict[str, object]]:
    """The perplexity of each thousand tokens of a text repeated four times."""
    runner = model._runner
    ids = np.asarray(model.tokenizer.encode(path.read_text(encoding="utf-8")) * 4, np.int32)
    nll: list[float] = []
    with runner.sequence(window) as sequence:
        for start in range(0, len(ids) - 1, runner.max_tokens):
            tokens = ids[start : min(start + runner.max_tokens, len(ids) - 1)]
            scores = runner.step([(sequence, tokens)], np.arange(len(tokens))).astype(np.float64)
            sequence.slide(sequence.n_tokens)
            most = scores.max(axis=1)
            right = scores[np.arange(len(tokens)), ids[start + 1 : start + 1 + len(tokens)]]
            nll += (np.log(np.exp(scores - most[:, None]).sum(axis=1)) + most - right).tolist()
    length = len(ids) // 4
    for again in range(4):
        for start in range(again * length, (again + 1) * length - EVERY, EVERY):
            perplexity = math.exp(sum(nll[start : start + EVERY]) / EVERY)
            yield {"case": "read", "position": start, "perplexity": round(perplexity, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    params = SamplingParams(temperature=1.0, ignore_eos=True, seed=arguments.seed)
    with Model.load(arguments.model) as model:
        policy = ContextPolicy("slide", window=arguments.window)
        if arguments.text is not None:
            for line in read(model, arguments.text, policy.visible(model.context)):
                print(json.dumps(line) if arguments.json else "  ".join(f"{k} {v}" for k, v in line.items()))
            return
        session = model.session(context_policy=policy, sampling=params)
        reply = session.tell(arguments.tokens, prompt="Once upon a time, a lighthouse keeper")
        logprobs: list[float] = []
        start = time.perf_counter()
        for n, piece in enumerate(reply, 1):
            logprobs.append(piece.logprob)
            if n % EVERY == 0:
                now, usage = time.perf_counter(), model.kv_usage
                facts = {
                    "case": "slide",
                    "n_tokens": n,
                    "tokens_per_s": round(EVERY / (now - start), 1),
                    "perplexity": round(math.exp(-sum(logprobs) / EVERY), 2),
                    "pages": usage.n_used,
                    "bytes": usage.used_bytes,
                }
                print(json.dumps(facts) if arguments.json else "  ".join(f"{k} {v}" for k, v in facts.items()))
                logprobs, start = [], time.perf_counter()
        if not arguments.json:
            print(session.head.cut, session.head.text[-400:], sep="\n")


if __name__ == "__main__":
    main()
