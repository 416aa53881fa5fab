"""Which tokens end an answer, and which are added before and after a text: of GGUF files and of folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import llama_vocabulary
from fabula.errors import InvalidArgument, Unsupported
from fabula.model import Model
from fabula.text.stream import BYTE_OF_CHARACTER
from fabula.text.tokenizer import Tokenizer, TokenizerWarning

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MERGES = ["t h", "th e", "< /", "s >", "</ s>"]  # the last makes the word "</s>"
BASE = [*BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in MERGES[:-1])]

# Special tokens, then keys by the tokens they name, then what ends an answer: llama.cpp's own answers.
CASES: dict[str, tuple[list[str], Mapping[str, str], list[str]]] = {
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "gpt-oss": (
        ["<|start|>", "<|end|>", "<|message|>", "<|return|>", "<|call|>", "<|endoftext|>"],
        {"bos": "<|start|>", "eos": "<|return|>"},
        ["<|return|>", "<|call|>", "<|endoftext|>"],
    ),
    "solar": (["<|end|>", "<|flush|>", "<|calls|>"], {"eos": "<|flush|>"}, ["<|flush|>", "<|calls|>"]),
    "return alone": (["<|end|>", "<|return|>"], {"eos": "<|return|>"}, ["<|return|>", "<|end|>"]),
    "phi": (["<s>", "<|end|>", "<|assistant|>"], {"bos": "<s>", "eos": "<|end|>"}, ["<|end|>"]),
    "gemma 4": (
        ["<eos>", "</s>", "<turn|>", "<|tool_response>"],
        {"eos": "<eos>"},
        ["<eos>", "<turn|>", "<|tool_response>"],
    ),
    "plamo": (["<|plamo:eos|>", "</s>"], {"eos": "<|plamo:eos|>"}, ["<|plamo:eos|>"]),
    "llama 3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    ),
    "gaps": (
        ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<e>"],
        {"eos": "<e>"},
        ["<e>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"],
    ),
    "named gap": (["<p>", "<|fim_pad|>", "<e>"], {"eos": "<e>", "fim_pad": "<p>"}, ["<e>", "<p>"]),
    "turns by key": (["<a>", "<b>", "<c>"], {"eos": "<c>", "eot": "<a>", "eom": "<b>"}, ["<c>", "<a>", "<b>"]),
    "others": (
        ["<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_turn>", "<end_of_utterance>", "[e~[", "<\uff5cend\u2581of"
         "\u2581sentence\uff5c>", "<|end_of_sentence|>"],
        {"eos": "[EOS]"},
        ["[EOS]", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>",
         "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["],
    ),
}  # fmt: skip


def gguf_keys(special: list[str], named: Mapping[str, str], kind: int = CONTROL) -> dict[str, Any]:
    tokens = [*BASE, *special]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(BASE) + [kind] * len(special),
        "tokenizer.ggml.merges": MERGES[:-1],
    }
    return keys | {f"tokenizer.ggml.{name}_token_id": tokens.index(token) for name, token in named.items()}


def read(keys: dict[str, Any]) -> Tokenizer:
    types = {"tokenizer.ggml.token_type": np.array(keys["tokenizer.ggml.token_type"], np.int32)}
    return Tokenizer.from_gguf(keys | types, Path("model.gguf"))


def texts_of(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.eos_ids]


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
@pytest.mark.parametrize("case", CASES)
def test_ends_of_a_gguf_file(case: str, kind: int) -> None:
    special, named, ends = CASES[case]
    tokenizer = read(gguf_keys(special, named, kind))
    assert texts_of(tokenizer) == ends
    names = {"<e>", "<a>", "<b>", "<c>", "<p>", "<|plamo:eos|>"}  # of no special kind but by their keys
    assert set(ends) - names <= set(tokenizer.special_tokens), "whatever the file takes them for, no user can write one"


@pytest.mark.parametrize("case", CASES)
def test_ends_of_a_folder_are_the_same(case: str, tmp_path: Path) -> None:
    special, named, ends = CASES[case]
    if not named.keys() <= {"bos", "eos", "eot", "eom"}:
        pytest.skip("folders have no word for it")
    write_folder(tmp_path, special, {f"{name}_token": token for name, token in named.items()})
    assert texts_of(Tokenizer.from_folder(tmp_path)) == ends


def test_ends_are_those_of_llama_cpp(tmp_path: Path) -> None:
    python = llama_vocabulary.python_with_llama_cpp()
    if python is None:
        pytest.skip("llama_cpp is not at hand (FABULA_TEST_LLAMA_CPP names an interpreter that has it)")
    keys = [gguf_keys(special, named) for special, named, _ in CASES.values()]
    paths = [llama_vocabulary.write(tmp_path / f"{i}.gguf", one) for i, one in enumerate(keys)]
    for one, theirs in zip(keys, llama_vocabulary.ask(python, paths, []), strict=True):
        assert theirs is not None
        assert sorted(read(one).eos_ids) == theirs["ends"]


def test_a_word_that_ends_an_answer_stays_a_word(tmp_path: Path) -> None:
    """Merging makes </s> in vocabularies that have seen HTML, as in Qwen's. llama.cpp ends there, and takes it for a
    control token; here a user who strikes text through writes text."""
    keys = gguf_keys(["</s>", "<|im_end|>"], {"eos": "<|im_end|>"}, NORMAL)
    keys |= {"tokenizer.ggml.merges": MERGES, "tokenizer.ggml.pre": "bloom"}
    tokenizer = read(keys)
    assert texts_of(tokenizer) == ["<|im_end|>", "</s>"]
    assert "</s>" not in tokenizer.special_tokens
    assert tokenizer.encode("the</s>") == [tokenizer.id_of(token) for token in ("the", "</s>")]
    write_folder(tmp_path, ["<|im_end|>"], {"eos_token": "<|im_end|>"}, merges=MERGES)
    folder = Tokenizer.from_folder(tmp_path)
    assert texts_of(folder) == ["<|im_end|>", "</s>"]
    assert "</s>" not in folder.special_tokens


def test_what_nothing_depends_on_is_passed_over() -> None:
    keys = gguf_keys(["<|im_end|>"], {"eos": "<|im_end|>"})
    for name, value in (("padding", 2**32 - 1), ("padding", 10**6), ("eot", 10**6), ("bos", 2**32 - 1)):
        with pytest.warns(TokenizerWarning, match=f"{name}_token_id is {value}, which is no id in"):
            tokenizer = read(keys | {f"tokenizer.ggml.{name}_token_id": value})
        assert texts_of(tokenizer) == ["<|im_end|>"]
        assert tokenizer.bos_id is None


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "hybriddna"])
def test_other_vocabularies_are_refused_by_name(kind: str) -> None:
    with pytest.raises(Unsupported, match=rf"model is '{kind}' \(.+\); known are gpt2, llama and gemma4"):
        read(gguf_keys(["<e>"], {"eos": "<e>"}) | {"tokenizer.ggml.model": kind})


# ---- Around a text --------------------------------------------------------------------------------------------------

ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken", "lfm2", "chameleon")


@pytest.mark.parametrize("pre", [*ADDS_BOS, "qwen2", "gpt-2", "smollm", "deepseek-llm", "gpt-4o"])
@pytest.mark.parametrize("said", [None, True, False])
def test_start_of_a_gguf_text(pre: str, said: bool | None) -> None:
    keys = gguf_keys(["<s>", "<e>"], {"bos": "<s>", "eos": "<e>"}) | {"tokenizer.ggml.pre": pre}
    tokenizer = read(keys if said is None else keys | {"tokenizer.ggml.add_bos_token": said})
    adds = pre in ADDS_BOS if said is None else said
    assert tokenizer.encode("the") == [tokenizer.bos_id] * adds + [tokenizer.id_of("the")]


def test_end_of_a_gguf_text() -> None:
    keys = gguf_keys(["<s>", "<e>"], {"bos": "<s>", "eos": "<e>"})
    tokenizer, the, end = read(keys), BASE.index("the"), len(BASE) + 1
    assert tokenizer.encode("the", add_eos=None) == [the]
    assert tokenizer.encode("the", add_eos=True) == [the, end]
    tokenizer = read(keys | {"tokenizer.ggml.add_eos_token": True})
    assert tokenizer.add_eos
    assert tokenizer.encode("the", add_eos=None) == [the, end]
    assert tokenizer.encode("the") == [the], "a text that is to be continued has no end"
    with pytest.raises(InvalidArgument, match="no end token"):
        read(gguf_keys(["<s>"], {})).encode("the", add_eos=True)


POST: dict[str, tuple[Any, list[str], list[str]]] = {
    "nothing": (None, [], []),
    "end": (processors.TemplateProcessing(single="$A <e>", special_tokens=[("<e>", 261)]), [], ["<e>"]),
    "both": (
        processors.TemplateProcessing(single="<s> $A <e>", special_tokens=[("<s>", 260), ("<e>", 261)]),
        ["<s>"],
        ["<e>"],
    ),
    "two before": (
        processors.TemplateProcessing(single="<e> <s> $A", special_tokens=[("<s>", 260), ("<e>", 261)]),
        ["<e>", "<s>"],
        [],
    ),
    "roberta": (processors.RobertaProcessing(("<e>", 261), ("<s>", 260)), ["<s>"], ["<e>"]),
    "bert": (processors.BertProcessing(("<e>", 261), ("<s>", 260)), ["<s>"], ["<e>"]),
    "byte level": (processors.ByteLevel(trim_offsets=True), [], []),
    "several": (
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 260)]),
            ]
        ),
        ["<s>"],
        [],
    ),
}  # fmt: skip


def write_folder(
    folder: Path, special: list[str], settings: Mapping[str, Any], post: Any = None, merges: list[str] = MERGES[:-1]
) -> Path:
    tokens = [*BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in merges)]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if post is not None:
        backend.post_processor = post
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("case", POST)
def test_a_post_processor_is_applied_whole(case: str, tmp_path: Path) -> None:
    post, before, behind = POST[case]
    write_folder(tmp_path, ["<s>", "<e>"], {"bos_token": "<s>", "eos_token": "<e>"}, post)
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the", "", "a b <s>"):
        ids = reference.encode(text, add_special_tokens=True).ids
        whole = tokenizer.encode(text, special=True, add_eos=None)
        assert whole == ids
        assert tokenizer.encode(text, special=True) == ids[: len(ids) - len(behind)]
    assert [tokenizer.token_text(i) for i in tokenizer.prefix] == before
    assert [tokenizer.token_text(i) for i in tokenizer.suffix] == behind
    assert tokenizer.add_bos == bool(before)


def test_settings_may_ask_for_an_end(tmp_path: Path) -> None:
    settings = {"eos_token": "<e>", "add_eos_token": True}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "a", ["<s>", "<e>"], settings))
    assert tokenizer.encode("the", add_eos=None) == [BASE.index("the"), tokenizer.id_of("<e>")]
    post = POST["end"][0]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "b", ["<s>", "<e>"], settings, post))
    assert tokenizer.encode("the", add_eos=None) == [BASE.index("the"), tokenizer.id_of("<e>")], "once"


def test_padding_and_truncation_of_training_are_not_ours(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["<e>"], {"eos_token": "<e>"})
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(length=16)
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    ids = Tokenizer.from_folder(folder).encode("the the the the the")
    assert len(ids) == 9


def test_an_embedding_is_that_of_the_whole_text(tiny_folder: Path, tmp_path: Path) -> None:
    """Its last token is the one that the tokenizer's template ends texts with; an answer starts after the text."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    backend = Backend.from_file(str(tiny_folder / "tokenizer.json"))
    end = backend.get_vocab_size() - 1
    name = backend.id_to_token(end)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, end)])
    (tmp_path / "tokenizer.json").unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    with Model.load(tmp_path, weights="f32") as model:
        ids = model.tokenizer.encode("the lion", add_bos=False)
        found = model.embed(["the lion"], pooling="last")
        assert found.n_tokens == (len(ids) + 1,)
        direct = model._embedder().embed([[*ids, end]], pooling="last")
        assert np.array_equal(found.vectors, direct.vectors)
        assert model.generate("the lion").prompt_ids[-1] == ids[-1]
