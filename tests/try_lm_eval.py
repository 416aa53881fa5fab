"""Scores a small task of lm-evaluation-harness through the server and through transformers, and compares.

    pip install "lm_eval[api,hf]"
    python tests/try_lm_eval.py [--fabula "fabula"]

The model is the tiny random one of the tests, so the scores say nothing about language: what counts is that both ways
agree. KV is f32, as rounded KV moves the sum of a target's log-probabilities by about 1e-4 of itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny

ROWS = [
    ("the cat is in", " the end", [" the end", " a stone", " all"], 0),
    ("in the end all is", " a test", [" a test", " the cat"], 0),
    ("there is the whale, and then", " the sea", [" the sea", " tin", " win"], 1),
    ("he that is in the inn", " is the one", [" is the one", " is on"], 0),
    ("all the stars on", " a string", [" the wall", " a string"], 1),
]
RELATIVE = 1e-5  # of a perplexity, which is the exponential of a sum: 1e-7 of the sum


def write(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The model, and the tasks."""
    model = tiny.write_model(folder / "tiny")
    for name, more in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
    ):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | more))
    lines = [json.dumps(dict(zip(("text", "target", "choices", "label"), row, strict=True))) for row in ROWS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_target": "{{label}}"}
    choice |= {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    target = {"task": "target", "output_type": "loglikelihood", "doc_to_target": "{{target}}"}
    target |= {"metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]}
    return model, [common | choice, common | target]


def scores(model: str, arguments: dict[str, Any], tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics by their names."""
    import lm_eval

    found: Any = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[dict(task) for task in tasks], device="cpu", bootstrap_iters=0
    )
    return {
        f"{task} {name.partition(',')[0]}": value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def main() -> int:
    """Prints both scores of each metric; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fabula", default="fabula", help="the command")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        model, tasks = write(Path(name))
        command = [*shlex.split(given.fabula), "serve", "--port", "0", "--kv", "f32", "--model", str(model)]
        with subprocess.Popen(
            [*command, "--data", name + "/data"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                assert server.stdout is not None
                address = server.stdout.readline().split()[-1]
                common = {"model": "tiny", "tokenizer": str(model), "tokenized_requests": True}
                ours = scores("local-completions", common | {"base_url": address + "/v1/completions"}, tasks)
            finally:
                server.terminate()
        arguments = {"pretrained": str(model), "dtype": "float32", "add_bos_token": False}
        theirs = scores("hf", arguments, tasks)
    differs = ours.keys() != theirs.keys()
    for name, value in ours.items():
        is_same = math.isclose(value, theirs.get(name, math.nan), rel_tol=RELATIVE)
        differs = differs or not is_same
        verdict = "same" if is_same else "DIFFERENT"
        print(f"{name}: {value!r} through Fabula, {theirs.get(name)!r} through transformers: {verdict}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
