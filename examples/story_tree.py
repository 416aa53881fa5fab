"""A story with branches: three continuations, two of which are continued to different ends.

python examples/story_tree.py "Once upon a time, a fox"
"""

from __future__ import annotations

import argparse
import sys

from fabula import EngineError, Model, SamplingParams


def tell(beginning: str, model_name: str, n_tokens: int, seed: int) -> None:
    with Model.load(model_name) as model:
        story = model.session(sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=seed))
        story.tell(n_tokens, prompt=beginning).text()
        print(f"{beginning}{story.head.text}\n")

        # Three branches, decoded in one batch over the shared KV pages.
        ways = story.branch(3, params=SamplingParams(temperature=1.0, seed=seed + 1, max_tokens=n_tokens))
        for number, way in enumerate(ways, 1):
            print(f"--- way {number}: {way.text().strip()}\n")

        for way in (ways[0], ways[2]):  # go to one branch and continue it, then another
            if way.turn is None:
                continue
            story.rollback(way.turn)
            story.tell(n_tokens).text()
            print(f"--- and so it ended: {story.head.text.strip()}")
            print(f"    [turn {story.head.number}: {story.head.reused} reused, {story.head.recomputed} recomputed]\n")
        print(f"{len(story.turns)} turns in the tree, {len(story.path)} on the path")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("beginning", nargs="?", default="Once upon a time, a fox who could read")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    try:
        tell(given.beginning, given.model, given.max_tokens, given.seed)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
