"""Token ids of llama.cpp for many vocabularies: recorded in tests/data/pre_tokenizers.json, or from an installed one.

    python tests/llama_vocabulary.py [PYTHON]

updates the record: texts and merges stay, ids are those of the llama_cpp of the interpreter PYTHON (default: this one).
With `--answer` it is the other process: it reads files and texts as JSON and writes llama.cpp's ids.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "data" / "pre_tokenizers.json"


def python_with_llama_cpp() -> str | None:
    """An interpreter that has llama_cpp: FABULA_TEST_LLAMA_CPP, or this one; None if neither is."""
    if named := os.environ.get("FABULA_TEST_LLAMA_CPP"):
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None


def ask(python: str, paths: Sequence[Path], texts: Sequence[str]) -> list[dict[str, Any] | None]:
    """What llama.cpp says of each file, None where it refuses it: "ids" of the texts, "ends", "add_bos"."""
    question = json.dumps({"paths": [str(path) for path in paths], "texts": list(texts)})
    done = subprocess.run([python, __file__, "--answer"], input=question, capture_output=True, text=True, check=True)
    answer: list[dict[str, Any] | None] = json.loads(done.stdout)
    return answer


def keys_of(merges: Sequence[str], pre: str | None) -> dict[str, Any]:
    """A byte-level vocabulary of 256 bytes and merges, as key-values of a GGUF file."""
    from fabula.text.stream import BYTE_OF_CHARACTER

    tokens = [*BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in merges), "<|im_start|>"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    return keys if pre is None else {**keys, "tokenizer.ggml.pre": pre}


def write(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF file without tensors."""
    import gguf_builder as g

    found = [g.key("general.architecture", g.STRING, "llama")]
    for name, value in keys.items():
        if isinstance(value, list):
            kind = g.STRING if isinstance(value[0], str) else g.FLOAT32 if isinstance(value[0], float) else g.INT32
            found.append(g.Key(name, g.ARRAY, g.array(kind, value)))
        else:
            kind = g.BOOL if isinstance(value, bool) else g.STRING if isinstance(value, str) else g.UINT32
            found.append(g.key(name, kind, value))
    path.write_bytes(g.build(found))
    return path


def record(python: str) -> None:
    """Updates `RECORDED`. Texts that several names split alike are written once."""
    from fabula.text.pretokenizers import PRE_TOKENIZERS

    data = json.loads(RECORDED.read_text(encoding="utf-8"))
    names = [*sorted(PRE_TOKENIZERS), None]
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"{i}.gguf", keys_of(data["merges"], name)) for i, name in enumerate(names)]
        answers = ask(python, paths, data["texts"])
    cuts: list[list[str]] = []
    by_name: dict[str, Any] = {}
    for i in range(len(data["texts"])):
        cuts.append(sorted({" ".join(map(str, answer["ids"][i])) for answer in answers if answer is not None}))
    for name, answer in zip(names, answers, strict=True):
        assert answer is not None, name
        picked = [cuts[i].index(" ".join(map(str, ids))) for i, ids in enumerate(answer["ids"])]
        by_name[name or ""] = {"add_bos": answer["add_bos"], "cuts": picked}
    head = {key: data[key] for key in ("origin", "merges", "texts")}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append('"cuts": [\n' + ",\n".join(json.dumps(ways) for ways in cuts) + "\n]")
    rows = (f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in by_name.items())
    lines.append('"names": {\n' + ",\n".join(rows) + "\n}")
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def answer_all(question: dict[str, Any]) -> list[dict[str, Any] | None]:
    """`ask`, on llama.cpp's side."""
    import ctypes

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    found: list[dict[str, Any] | None] = []
    for path in question["paths"]:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not model:
            found.append(None)
            continue
        vocab = llama_cpp.llama_model_get_vocab(model)
        ids = []
        for text in question["texts"]:
            raw = text.encode()
            room = (llama_cpp.llama_token * (2 * len(raw) + 16))()
            n = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, len(room), False, False)
            ids.append(list(room[:n]))
        n_tokens = llama_cpp.llama_vocab_n_tokens(vocab)
        found.append(
            {
                "ids": ids,
                "ends": [i for i in range(n_tokens) if llama_cpp.llama_vocab_is_eog(vocab, i)],
                "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
            }
        )
        llama_cpp.llama_model_free(model)
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--answer"]:
        json.dump(answer_all(json.load(sys.stdin)), sys.stdout)
    else:
        record(sys.argv[1] if len(sys.argv) > 1 else sys.executable)
