"""docs/models.md: which families load, from which files, and how close their logits are.

`FABULA_WRITE_DOCS=1 pytest tests/test_models_page.py -m heavy` measures every family and writes the page. Without it
the page must list the families that there are, and what is measured must be no worse than the page says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder_families import CASES, Case, make_model
from fabula.formats.checkpoint import DType
from fabula.formats.gguf_families import ARCHITECTURES
from fabula.models.families import FAMILIES
from test_decoder_families import N, expected, load, text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
FORMATS = (DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0)
# The largest error that a format may have: of f32 |difference| / max |logit|, of the others the relative error (root
# mean square). Random models of three layers are less kind than trained ones.
BOUNDS: Mapping[DType, float] = {
    DType.F32: 1e-4, DType.F16: 3e-2, DType.BF16: 2e-1, DType.Q8_0: 5e-1, DType.Q4_0: 1.5,
}  # fmt: skip
SPARSE = 4e-1  # least bound of rounded mixtures: a token may go to another expert, which then counts as a whole
_MORE = {name: Case(family) for name, family in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))}
_MORE["qwen3"] = Case("Qwen3")
# Compared with the code that is published beside their weights, or with the family that they are.
_ELSEWHERE = {
    "internlm2": "their published code", "baichuan": "their published code", "minicpm": "their published code",
    "kimi_k2": "DeepSeek V3, in tests/test_latent.py",
    "muse_glimmer_text": "transformers, in tests/test_text_parts.py",
    "qwen2_vl_text": "transformers, in tests/test_text_parts.py",
    "qwen2_5_vl_text": "transformers, in tests/test_text_parts.py",
    "qwen3_vl_text": "transformers, in tests/test_text_parts.py",
}  # fmt: skip

HEAD = """# Models

Written by `tests/test_models_page.py`, when `FABULA_WRITE_DOCS=1` and its heavy tests run.

A family loads from a Hugging Face folder by the `model_type` of its config.json, and from a GGUF
file by its architecture.
Text parts of multimodal checkpoints load too; `fabula inspect` says what is left out.
A name that is not listed is refused, and so is a field of a config that Fabula does not compute.

Each family is compared with transformers on a tiny random checkpoint with odd shapes: three layers,
heads of 24 or 40, windows shorter than the text.
`f32` is the largest difference of a logit, relative to the largest logit.
The other columns are the relative error of all logits, with weights in that format.
Random weights keep less of it than trained ones.
Families with several settings show the worst.

| family | model_type | GGUF architectures | f32 | f16 | bf16 | q8_0 | q4_0 |
|---|---|---|---|---|---|---|---|
"""


def cases_of(model_type: str) -> dict[str, Case]:
    return {name: case for name, case in (CASES | _MORE).items() if case.model_type == model_type}


def widened(case: Case) -> Case:
    """The case with widths of whole blocks, so that block formats are used."""
    old = case.settings
    if "longrope" in str(old):  # one factor for each pair of a head
        return case
    key = next(key for key in ("n_embd", "d_model", "hidden_size") if key in old)
    factor = 32 // math.gcd(32, old[key])
    settings = {**old, key: old[key] * factor} | ({"intermediate_size": 256} if "intermediate_size" in old else {})
    settings |= {key: old[key] * factor for key in ("mamba_d_head", "mamba_d_ssm") if key in old}
    settings |= {"mamba_head_dim": 32} if "mamba_head_dim" in old else {}
    settings |= {key: 32 for key in ("linear_key_head_dim", "linear_value_head_dim") if key in old}
    settings |= {key: 64 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in old}
    settings |= {key: 64 for key in ("kv_lora_rank", "q_lora_rank") if old.get(key)}
    settings |= {key: 32 for key in ("qk_nope_head_dim", "v_head_dim") if old.get(key)}
    if "head_dim" in old and old["head_dim"] * old["num_attention_heads"] == old[key]:
        settings["head_dim"] = old["head_dim"] * factor
    return replace(case, settings=settings)


def error_of(case: Case, folder: Path, *dtypes: DType) -> list[float]:
    """The error of a case in some formats."""
    ids, found = text(1, N), []
    model = make_model(case, folder)
    theirs = expected(model, ids)
    for dtype in dtypes:
        runner = load(folder, weights=dtype, context=N if "longrope" in str(case.settings) else None)
        (ours,) = runner.all_logits(ids)
        runner.close()
        apart, exact = ours - theirs, dtype is DType.F32
        relative = (
            np.abs(apart).max() / np.abs(theirs).max() if exact else np.linalg.norm(apart) / np.linalg.norm(theirs)
        )
        found.append(float(relative))
    return found


def errors(case: Case, folder: Path) -> list[float]:
    """The error in each of FORMATS. A wider random model doubts more: f32 is measured on the case as it is."""
    return error_of(case, folder / "f32", DType.F32) + error_of(widened(case), folder / "wide", *FORMATS[1:])


def rows() -> Iterator[list[str]]:
    """The rows of the page without figures: family, model_type, architectures."""
    for model_type, family in FAMILIES.items():
        names = [name for name, row in ARCHITECTURES.items() if row.model_type == model_type]
        yield [family.name, f"`{model_type}`", ", ".join(f"`{name}`" for name in names)]


def shown() -> list[list[str]]:
    """The cells of the page's rows."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_family() -> None:
    if os.environ.get("FABULA_WRITE_DOCS") == "1":
        pytest.skip("it is being written")
    assert [row[:3] for row in shown()] == list(rows())


@pytest.mark.heavy
def test_every_format_of_every_family(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Errors in f32, f16, bf16, q8_0 and q4_0 keep their bounds, and are no worse than the page says."""
    writes = os.environ.get("FABULA_WRITE_DOCS") == "1"
    known: dict[str, Any] = {} if writes else {row[1]: row[3:] for row in shown()}
    lines = []
    for model_type, (name, column, architectures) in zip(FAMILIES, rows(), strict=True):
        cases = cases_of(model_type)
        if not cases:
            lines.append([name, column, architectures, f"{_ELSEWHERE[model_type]}", "", "", "", ""])
            continue
        found = np.max([errors(case, tmp_path_factory.mktemp(model_type)) for case in cases.values()], axis=0)
        for error, dtype in zip(found, FORMATS, strict=True):
            is_exact = dtype is DType.F32 or FAMILIES[model_type].traits.experts is None
            bound = BOUNDS[dtype] if is_exact else max(BOUNDS[dtype], SPARSE)
            assert error <= bound, f"{model_type} in {dtype.name}: {error:.1e}"
        for error, cell in zip(found, known.get(column, []), strict=False):
            assert error <= 2 * float(cell) + 1e-6, f"{model_type}: the page says {cell}, measured {error:.1e}"
        lines.append([name, column, architectures, *(f"{error:.1e}" for error in found)])
    if writes:
        PAGE.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines))
