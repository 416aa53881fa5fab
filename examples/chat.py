"""A chat in 40 lines: python examples/chat.py [--model NAME] [--system TEXT]. Ctrl-C stops a reply, Ctrl-D exits."""

import argparse

from fabula import EngineError, Model, SamplingParams

parser = argparse.ArgumentParser(description="Chat with a model. Each reply depends on the whole conversation.")
parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, .gguf file or name")
parser.add_argument("--system", default="You are a helpful, brief assistant.")
parser.add_argument("--seed", type=int, help="the same seed gives the same replies")
options = parser.parse_args()


def main() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=400, seed=options.seed)
    messages = [{"role": "system", "content": options.system}]
    with Model.load(options.model) as model:
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not question:
                continue
            messages.append({"role": "user", "content": question})
            answer = ""
            with model.chat(messages, params) as reply:
                try:
                    for piece in reply:
                        print(piece.text, end="", flush=True)
                        answer += piece.text
                except KeyboardInterrupt:
                    pass  # keep the partial reply in the conversation
            print()
            messages.append({"role": "assistant", "content": answer})


try:
    main()
except EngineError as error:
    raise SystemExit(f"error: {error}") from None
