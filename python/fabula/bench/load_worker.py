"""A process that loads a model and generates one token, for `fabula bench load`.

Run with `python -m`. Reads one JSON object a line from stdin and answers with one on stdout, `{"error": text}` on
failure; then it waits until stdin is closed, so that its memory can be measured:

    {"do": "first", "path": file, "weights": name, "threads": n, "kv": "f16", "positions": n, "prompt": [ids],
     "device": name}
        -> {"token": id, "settings": text, "weights": name, "weight_bytes": n}
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError
from fabula.model import Model


def first(
    stack: ExitStack, path: str, weights: Any, threads: int, kv: str, positions: int, prompt: list[int], device: str
) -> dict[str, Any]:
    """Computes the answer; the model stays open as long as the stack."""
    model = stack.enter_context(
        Model.load(path, weights=weights, threads=threads, kv=kv, context=positions, device=device, fetch=False)
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with model.generate(prompt, params) as generation:
        next(generation)
        token = generation.token_ids[0]
    return {
        "token": token,
        "settings": f"{model.threads} threads, kv {model.kv}",
        "weights": model.weights,
        "weight_bytes": model.weight_bytes,
    }


def main() -> None:
    with ExitStack() as stack:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = first(stack, **{name: value for name, value in request.items() if name != "do"})
            except EngineError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
