"""Tells a story: python examples/story.py "Once upon a time" [--model NAME] [--seed N] [--max-tokens N]"""

import argparse

from fabula import EngineError, Model, SamplingParams

parser = argparse.ArgumentParser(description="Continue a text and print the speed.")
parser.add_argument("prompt", nargs="?", default="Once upon a time, in a small house by the sea,")
parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, .gguf file or name")
parser.add_argument("--seed", type=int, help="the same seed gives the same story")
parser.add_argument("--max-tokens", type=int, default=200)
options = parser.parse_args()


def main() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=options.seed, max_tokens=options.max_tokens)
    with Model.load(options.model) as model:
        print(options.prompt, end="", flush=True)
        with model.generate(options.prompt, params) as story:
            try:
                for piece in story:
                    print(piece.text, end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")  # Ctrl-C ends the story, not the program
        t = story.timings
        print(f"\n\n[{t.generated_tokens} tokens, {t.tokens_per_s:.0f} tokens/s, seed {story.seed}]")


try:
    main()
except EngineError as error:
    raise SystemExit(f"error: {error}") from None
