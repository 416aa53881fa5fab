"""llama.cpp's own routes in its shapes, prompts with probabilities, and gaps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import Model, SamplingParams
from fabula.engine.decoding import log_sum_exp
from fabula.engine.generation import Generation
from fabula.text.fim import MARKS, gap_prompt
from serving import Running
from test_openai_inside import Inside, inside
from tool_templates import tokenizer_of

ASKED: dict[str, Any] = {"prompt": "the cat", "n_predict": 6, "seed": 4, "ignore_eos": True}


# ---- /completion ----------------------------------------------------------------------------------------------------


def test_completion(tiny_server: Running) -> None:
    whole = tiny_server.post("/completion", **ASKED, n_probs=2, return_tokens=True, cache_prompt=True)
    other = tiny_server.post("/v1/completions", prompt="the cat", max_tokens=6, seed=4, ignore_eos=True)
    assert whole["content"] == other["choices"][0]["text"]
    assert whole["stop"] and (whole["stop_type"], whole["tokens_predicted"]) == ("limit", 6)
    assert whole["tokens_evaluated"] == other["usage"]["prompt_tokens"] and len(whole["tokens"]) == 6
    assert whole["timings"]["predicted_n"] == 6 and whole["generation_settings"]["n_predict"] == 6
    assert [len(entry["top_logprobs"]) for entry in whole["completion_probabilities"]] == [2] * 6
    text = tiny_server.client.post("/completion", json=ASKED | {"stream": True}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_ends_of_completions(tiny_server: Running) -> None:
    free = tiny_server.post("/completion", **ASKED)["content"]
    cut = tiny_server.post("/completion", **ASKED, stop=[free[2]])
    assert cut["content"] == free[:2] and (cut["stop_type"], cut["stopping_word"]) == ("word", free[2])
    ended = tiny_server.post("/completion", **ASKED | {"ignore_eos": False}, logit_bias=[[1, 100.0]])
    assert ended["stop_type"] == "eos" and ended["content"] == ""
    many = tiny_server.post("/completion", **ASKED | {"prompt": ["the cat", [5, 6], ["in", 7]]})
    assert [one["index"] for one in many] == [0, 1, 2] and many[0]["content"] == free
    assert many[2]["prompt"].startswith("in")
    for wrong in (5, [], [True], [[]], {}):
        assert tiny_server.post("/completion", 400, prompt=wrong)["error"]["param"].startswith("prompt")


# ---- What runs ------------------------------------------------------------------------------------------------------


def test_slots(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        status, idle = await client.get("/slots")
        assert (status, [one["id"] for one in idle]) == (200, [0, 1])
        assert not any(one["is_processing"] for one in idle) and idle[0]["n_ctx"] == 600
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        with Generation(state.models["tiny"].model._engine, [5, 6, 7], params, continues=True) as running:
            next(running)
            runs = [SimpleNamespace(tenant=tenant, sources=[running]) for tenant in ("", "another")]
            state.runs.active = lambda: runs
            mine, theirs = (await client.get("/slots"))[1]
            assert (mine["n_prompt_tokens"], mine["next_token"][0]["n_decoded"]) == (3, 1)
            assert mine["next_token"][0]["n_remain"] == 49
            assert theirs == {"id": 1, "n_ctx": 600, "speculative": False, "is_processing": True}
            status, error = await client.get("/slots?fail_on_no_slot=1")
            assert (status, error["error"]["code"]) == (503, "no_slot")
            del state.runs.active
        assert (await client.get("/slots?fail_on_no_slot=1"))[0] == 200

    inside(tmp_path, tiny_folder, work, max_running=2)


# ---- Text -----------------------------------------------------------------------------------------------------------


def test_embedding(tiny_server: Running) -> None:
    ours = tiny_server.post("/v1/embeddings", input=["the cat", "é"])["data"]
    for body in ({"content": ["the cat", "é"]}, {"input": ["the cat", "é"], "embd_normalize": 2}):
        found = tiny_server.post("/embedding", **body)
        assert found == [{"index": i, "embedding": [one["embedding"]]} for i, one in enumerate(ours)]
    assert tiny_server.post("/embedding", content="the cat")[0]["embedding"] == [ours[0]["embedding"]]
    assert tiny_server.post("/embedding", 400, content="a", embd_normalize=-1)["error"]["param"] == "embd_normalize"
    assert tiny_server.post("/embedding", 400, content="")["error"]["param"] == "input"


def test_tokenize_in_both_forms(tiny_server: Running) -> None:
    ours = tiny_server.post("/tokenize", text="the cat é")
    assert tiny_server.post("/tokenize", content="the cat é", add_special=True)["tokens"] == ours["tokens"]
    pieces = tiny_server.post("/tokenize", content="the cat é", with_pieces=True)["tokens"]
    assert [one["id"] for one in pieces] == ours["tokens"] and pieces[-1]["piece"] == [0xA9]
    assert "".join(one["piece"] for one in pieces if isinstance(one["piece"], str)) == "the cat "
    special = tiny_server.post("/tokenize", content="<|im_end|>")["tokens"]
    assert special == [3]
    assert tiny_server.post("/detokenize", tokens=special)["content"] == "<|im_end|>"
    assert tiny_server.post("/tokenize", 400)["error"]["param"] in ("text", None)


def test_apply_template_and_props(tiny_server: Running) -> None:
    messages = [{"role": "system", "content": None}, {"role": "user", "content": "hi <|im_end|>"}]
    found = tiny_server.post("/apply-template", messages=messages)["prompt"]
    assert found == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    answer = tiny_server.post("/apply-template", messages=[*messages, {"role": "assistant", "content": "So"}])
    assert answer["prompt"] == found + "So"
    props = tiny_server.get("/props")
    assert props["chat_template"] == tiny.CHATML and props["default_generation_settings"]["n_ctx"] == 600
    assert (props["bos_token"], props["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/reranking"])
def test_rerank(tiny_server: Running, path: str) -> None:
    documents = ["in the end", "the cat", {"text": "stones"}]
    found = tiny_server.post(path, query="the cat", documents=documents, return_documents=True)
    scores = [one["relevance_score"] for one in found["results"]]
    assert scores == sorted(scores, reverse=True) and found["usage"]["total_tokens"] > 0
    assert found["results"][0]["index"] == 1 and found["results"][0]["document"] == {"text": "the cat"}
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert len(tiny_server.post(path, query="the cat", documents=documents, top_n=2)["results"]) == 2
    for wrong, param in (({"documents": []}, "documents"), ({"documents": ["a", ""]}, "documents[1]")):
        assert tiny_server.post(path, 400, query="a", **wrong)["error"]["param"] == param


# ---- Prompts with probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_with_probabilities(tiny_server: Running, tiny_model: Model, as_ids: bool) -> None:
    text = "the cat is in the end é of it all, " * 5  # several steps
    ids = tiny_model.tokenizer.encode(text)
    assert len(ids) > 64
    asked = {"prompt": ids if as_ids else text, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    (choice,) = tiny_server.post("/v1/completions", **asked)["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1 and logprobs["token_logprobs"][0] is None
    logits = tiny_model.logits(ids)
    wanted = [float(logits[i][token]) - log_sum_exp(logits[i]) for i, token in enumerate(ids[1:])]
    np.testing.assert_array_equal(logprobs["token_logprobs"][1:-1], wanted)
    assert choice["text"].startswith(text)
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[:-1]:
        assert choice["text"].startswith(token, offset) or "\N{REPLACEMENT CHARACTER}" in token, (token, offset)
    assert logprobs["text_offset"][-1] == len(text)
    best = [max(top, key=top.get) for top in logprobs["top_logprobs"][1:]]  # as evaluation harnesses read it
    assert len(best) == len(ids) and best[-1] == logprobs["tokens"][-1]
    alone = tiny_server.post("/v1/completions", **asked | {"max_tokens": 0})["choices"][0]
    assert alone["text"] == text and alone["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    lines = tiny_server.client.post("/v1/completions", json=asked | {"stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    streamed = [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["token_logprobs"]]
    assert streamed == logprobs["token_logprobs"]


# ---- Gaps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks[0])
def test_prompts_of_gaps(marks: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of(has_marks=False, more=tuple(mark for mark in marks if mark))
    gap = gap_prompt(tokenizer, "before", "after", begun="So")
    assert gap is not None
    text = tokenizer.decode(gap.ids, skip_special=False)
    prefix, suffix, middle = marks
    wanted = f"{prefix}before{suffix}after{middle}So" if middle else f"{suffix}after{prefix}beforeSo"
    assert text == wanted and set(gap.ends) == {tokenizer.special_tokens[mark] for mark in marks if mark}


def test_other_files_come_first() -> None:
    more = (*MARKS[0], "<|file_sep|>", "<|repo_name|>", "<|fim_pad|>")
    tokenizer = tokenizer_of(has_marks=False, more=more)
    gap = gap_prompt(tokenizer, "a", "<|fim_middle|>", extra=[("x.py", "x = 1")])
    assert gap is not None and len(gap.ends) == 6
    text = tokenizer.decode(gap.ids, skip_special=False)
    assert text.startswith("<|repo_name|>repository\n<|file_sep|>x.py\nx = 1\n<|file_sep|>")
    middle = tokenizer.special_tokens["<|fim_middle|>"]
    assert gap.ids.count(middle) == 1 and gap.ids[-1] == middle, "a mark in a text is text"


def test_gaps_need_marks(tiny_server: Running) -> None:
    for path, asked in (
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
    ):
        error = tiny_server.post(path, 400, **asked)["error"]
        assert error["code"] == "unsupported" and "marks for gaps" in error["message"]


def test_gaps_are_filled(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "coder")
    described = json.loads((model / "tokenizer.json").read_text())
    for i, token in enumerate(("<fim_prefix>", "<fim_suffix>", "<fim_middle>")):  # in place of words of the vocabulary
        word = next(piece for piece, n in described["model"]["vocab"].items() if n == 20 + i)
        described["model"]["vocab"].pop(word)
        described["model"]["vocab"][token] = 20 + i
        described["added_tokens"].append({**described["added_tokens"][0], "id": 20 + i, "content": token})
    (model / "tokenizer.json").write_text(json.dumps(described))
    with Running(tmp_path / "data", model) as running:
        asked = {"seed": 1, "ignore_eos": True}
        filled = running.post("/infill", input_prefix="the ", input_suffix=" cat", n_predict=5, **asked)
        assert filled["prompt"] == "<fim_prefix>the <fim_suffix> cat<fim_middle>" and filled["tokens_predicted"] <= 5
        (choice,) = running.post("/v1/completions", prompt="the ", suffix=" cat", max_tokens=5, **asked)["choices"]
        assert choice["text"] == filled["content"]
