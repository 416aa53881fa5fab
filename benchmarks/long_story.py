"""A story longer than the context: speed, pages and perplexity per 1,000 tokens, with a sliding window.

    python benchmarks/long_story.py [--model NAME] [--tokens N] [--window W] [--json]

Perplexity is that of the model's own text under the plain softmax of its own logits: what it would climb if the model
lost the thread once the beginning is gone. Tokens are drawn from the whole distribution (temperature 1): a small model
that is made to take what is likely soon repeats a sentence for ever, at a perplexity of 1.
"""

from __future__ import annotations

import argparse
import json
import math
import time

from fabula import ContextPolicy, Model, SamplingParams

EVERY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    params = SamplingParams(temperature=1.0, ignore_eos=True, seed=arguments.seed)
    with Model.load(arguments.model) as model:
        policy = ContextPolicy("slide", window=arguments.window)
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
