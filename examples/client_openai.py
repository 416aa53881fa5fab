"""The `openai` client against `fabula serve`: python examples/client_openai.py [--address URL] [--key KEY].

Any client of OpenAI's API is configured the same way: base URL is the server's address followed by /v1.
"""

import argparse

from openai import OpenAI, OpenAIError

parser = argparse.ArgumentParser(description="Chat, stream, and roll back a conversation stored on the server.")
parser.add_argument("--address", default="http://127.0.0.1:8000")
parser.add_argument("--key", default="none", help="API key, if the server needs one")
parser.add_argument("--model", help="default: the server's first")
options = parser.parse_args()


def main(client: OpenAI) -> None:
    model = options.model or client.models.list().data[0].id

    print("A stream:")
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Name three rivers."}], max_tokens=40, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

    # The server stores this conversation. Any response can be continued; only the new tokens are computed.
    first = client.responses.create(
        model=model, input="My cat is called Mia.", instructions="Answer in a sentence.", max_output_tokens=40
    )
    for question in ("What is my cat called?", "Write a line about her."):
        answer = client.responses.create(
            model=model, input=question, previous_response_id=first.id, max_output_tokens=40
        )
        assert answer.usage is not None
        cached = answer.usage.input_tokens_details.cached_tokens
        print(f"\n\n{question}\n{answer.output_text}\n[{cached} of {answer.usage.input_tokens} tokens reused]")


try:
    with OpenAI(base_url=options.address + "/v1", api_key=options.key) as client:
        main(client)
except OpenAIError as error:
    raise SystemExit(f"error: {error}") from None
