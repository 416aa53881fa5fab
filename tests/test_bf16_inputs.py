"""The two arithmetics of bf16 weights: inputs rounded to bf16, or f32. Each can be forced, and is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fabula import InvalidArgument, Model, SamplingParams, Unsupported, _native, ops
from fabula._native import Isa, Weight, inputs_of_bf16
from fabula.cli.main import cli
from fabula.engine.runner import Runner
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint
from fabula.server.settings import Settings

ISAS: list[Any] = [isa for isa in get_args(Isa) if isa != "auto" and _native.isa_available(isa)]
FAST = ("avx512_bf16", "avx512_amx")


def loaded(folder: Path, **options: Any) -> Model:
    return Model.load(folder, **({"weights": "bf16", "threads": 1} | options))


def test_auto_is_what_the_cpu_multiplies_faster() -> None:
    for isa in get_args(Isa)[1:]:
        assert inputs_of_bf16("auto", isa) == ("bf16" if isa in FAST else "f32")
        assert (inputs_of_bf16("bf16", isa), inputs_of_bf16("f32", isa)) == ("bf16", "f32")
    for isa in ISAS:
        with _native.isa_forced(isa):
            assert inputs_of_bf16("auto") == inputs_of_bf16("auto", isa)


def test_either_kind_is_replayed_on_every_instruction_set(tiny_folder: Path) -> None:
    """Text, log-probabilities and fingerprint; the fingerprints of the two kinds differ."""
    params = SamplingParams(max_tokens=12, seed=5, temperature=0.9, n_logprobs=1)
    found: dict[str, set[Any]] = {"bf16": set(), "f32": set()}
    for isa in ISAS:
        with _native.isa_forced(isa):
            for wanted in ("bf16", "f32", "auto"):
                with loaded(tiny_folder, bf16_inputs=wanted) as model:
                    kind = model.bf16_inputs
                    assert kind == inputs_of_bf16(wanted, isa)  # type: ignore[arg-type]
                    answer = [(piece.text, piece.logprob) for piece in model.generate("the winter", params)]
                    found[kind].add((model.fingerprint.key, tuple(answer)))
    assert len(found["bf16"]) == len(found["f32"]) == 1
    assert found["bf16"] != found["f32"]


def test_the_fingerprint_says_which(tiny_folder: Path) -> None:
    with loaded(tiny_folder, bf16_inputs="bf16") as one, loaded(tiny_folder, bf16_inputs="f32") as other:
        assert one.fingerprint.weights == other.fingerprint.weights
        difference = one.fingerprint.difference(other.fingerprint)
    assert "bf16 weights x bf16 inputs here" in difference and "bf16 weights x f32 inputs there" in difference
    with loaded(tiny_folder, weights="f16", bf16_inputs="f32") as plain, loaded(tiny_folder, weights="f16") as auto:
        assert plain.bf16_inputs is None
        assert plain.fingerprint == auto.fingerprint, "it changes nothing without bf16 weights"


def test_inputs_in_f32_are_not_rounded() -> None:
    x = np.array([[1.0 + 2.0**-20, 3.0]], np.float32)  # the first is no bf16
    matrix = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], np.float32)
    kept = ops.linear(x, ops.pack(matrix, precision="bf16", bf16_inputs="f32"))
    rounded = ops.linear(x, ops.pack(matrix, precision="bf16"))
    assert kept.tolist() == [[1.0 + 2.0**-20, 3.0, float(np.float32(4.0 + 2.0**-20))]]
    assert rounded.tolist() == [[1.0, 3.0, 4.0]]


def test_bad_values(tiny_folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="bf16_inputs is 'f16', must be one of auto, bf16, f32"):
        loaded(tiny_folder, bf16_inputs="f16")
    with pytest.raises(InvalidArgument, match="bf16_inputs is 'auto', must be bf16 or f32"):
        ops.pack(np.ones((1, 2)), precision="bf16", bf16_inputs="auto")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="only products with bf16 weights"):
        Weight(DType.F16, 1, 2, f32_inputs=True)


def test_a_gpu_has_its_own_arithmetic(tiny_folder: Path) -> None:
    """Before anything is packed, so this needs no GPU."""
    placement: Any = SimpleNamespace(
        n_devices=1, is_cpu=False, products="own", choose=lambda _: SimpleNamespace(members=())
    )
    options: dict[str, Any] = {"weights": DType.BF16, "kv": (DType.F16, DType.F16), "n_threads": 1}
    checkpoint = open_checkpoint(tiny_folder)
    with pytest.raises(Unsupported, match='bf16_inputs="bf16" needs the CPU'):
        Runner(checkpoint, **options, placement=placement, bf16_inputs="bf16")
    checkpoint.close()


def command(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_commands_and_server(tiny_folder: Path) -> None:
    for kind in ("bf16", "f32"):
        done = command(
            "story", "-m", tiny_folder, "--weights", "bf16", "--bf16-inputs", kind, "-n", 3, "--no-save", "the"
        )
        assert done.exit_code == 0, done.output
    assert "--bf16-inputs" in command("story", "-m", tiny_folder, "--bf16-inputs", "f16", "the").output
    assert Settings(bf16_inputs="f32").bf16_inputs == "f32"


def test_inspect_names_it(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    quantize_model(tiny_folder, file, "bf16")
    for isa in ISAS:
        with _native.isa_forced(isa):
            kind = inputs_of_bf16("auto")
            assert json.loads(command("inspect", file, "--json").stdout)["bf16_inputs"] == kind
            assert f"--bf16-inputs {'f32' if kind == 'bf16' else 'bf16'}" in command("inspect", file).stdout
    assert json.loads(command("inspect", tiny_folder, "--json").stdout)["bf16_inputs"] is None
    assert "--bf16-inputs" not in command("inspect", tiny_folder).stdout
