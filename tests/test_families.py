"""Each family against transformers on tiny random checkpoints, with shapes that fit no register.

Bound: |Δlogit| <= 1e-4 max|logit| in f32. Both sides compute in f32 but sum in another order; the differences grow
with the square root of the number of terms, and two layers stay a factor of ten below the bound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from fabula.engine.runner import Runner
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint

ODD = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 80,
    "vocab_size": 203,
    "max_position_embeddings": 1024,
}
PLAIN = ODD | {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(40)],
    "long_factor": [2.0 + 0.2 * i for i in range(40)],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ODD),
    "llama-mqa-tied": ("Llama", PLAIN),
    "llama-biases": ("Llama", ODD | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", ODD | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama-dynamic": ("Llama", ODD | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": ("Llama", ODD | {"rope_scaling": YARN}),
    "llama-llama3": ("Llama", ODD | {"rope_scaling": LLAMA3}),
    "llama-longrope": ("Llama", ODD | {"rope_scaling": LONGROPE}),
    "mistral": ("Mistral", ODD | {"sliding_window": None}),
    "mistral-window": ("Mistral", ODD | {"sliding_window": 17}),
    "qwen2": ("Qwen2", {k: v for k, v in ODD.items() if k != "head_dim"} | {"hidden_size": 96}),
    "qwen2-window": (
        "Qwen2",
        {k: v for k, v in ODD.items() if k != "head_dim"}
        | {"hidden_size": 96, "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", ODD),
    "qwen3-tied": ("Qwen3", PLAIN),
}


def make_checkpoint(folder: Path, family: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """Writes a random checkpoint and returns the transformers model, in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # the default start is so small that every logit is almost the same; biases start at 0
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or "bias" in name else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Runner:
    checkpoint = open_checkpoint(folder)
    try:
        settings: dict[str, Any] = {"weights": DType.F32, "kv": DType.F32, "n_threads": 2}
        return Runner(checkpoint, **(settings | options))
    finally:
        checkpoint.close()


def expected(model: Any, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor(ids[None].astype(np.int64))).logits[0].float().numpy()


def assert_close(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32], bound: float = 1e-4) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= bound, f"logits differ by {error:.2e} of the largest"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    family, settings = CASES[request.param]
    model = make_checkpoint(folder, family, settings)
    # Scalings that depend on the context's length are those of a text as long as the context it was loaded for.
    runner = load(folder, context=600 if "longrope" in request.param else None)
    yield model, runner
    runner.close()


def test_prefill_and_decode(case: Any) -> None:
    model, runner = case
    ids = np.random.default_rng(1).integers(0, runner.config.vocab_size, 600).astype(np.int32)
    theirs = expected(model, ids)
    ours = np.concatenate(list(runner.all_logits(ids)))  # chunks of 512 and 88
    assert_close(ours, theirs)
    with runner.sequence() as sequence:
        last = runner.prefill(sequence, ids[:590])
        assert_close(last[None], theirs[589:590])
        for i in range(590, 600):
            (one,) = runner.step([(sequence, ids[i : i + 1])], [0])
            assert (one == ours[i]).all(), "a decoded token's logits must be those of the prefill, bit for bit"


def test_mixed_batch(case: Any) -> None:
    """A prompt, a decode and a chunk of three sequences in one step: the bits of each alone."""
    model, runner = case
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, runner.config.vocab_size, n).astype(np.int32) for n in (70, 97, 300)]
    past = [0, 96, 250]
    sequences = [runner.sequence() for _ in texts]
    try:
        for sequence, ids, n in zip(sequences, texts, past, strict=True):
            if n:
                runner.prefill(sequence, ids[:n])
        parts = [(s, ids[n:]) for s, ids, n in zip(sequences, texts, past, strict=True)]
        logits = runner.step(parts, np.arange(70 + 1 + 50))
        start = 0
        for ids, n in zip(texts, past, strict=True):
            count = len(ids) - n
            ours = logits[start : start + count]
            assert_close(ours, expected(model, ids)[n:])
            alone = np.concatenate(list(runner.all_logits(ids)))[n:]
            assert (ours == alone).all()
            start += count
    finally:
        for sequence in sequences:
            sequence.close()
    assert runner.pool.n_free == runner.pool.n_pages


@pytest.mark.parametrize(("weights", "inputs"), [(DType.F16, "auto"), (DType.BF16, "bf16"), (DType.BF16, "f32")])
def test_half_precision(weights: DType, inputs: str, tmp_path: Path) -> None:
    """16-bit weights: close to transformers on the same rounded weights, f16 with KV in f16; bf16 weights take inputs
    in f32 or rounded to bf16, sums are in f32."""
    model = make_checkpoint(tmp_path, "Llama", ODD)
    torch_type = torch.float16 if weights == DType.F16 else torch.bfloat16
    # With keys and values rounded, too, more inputs would lie on the other side of a rounding to bf16 than theirs.
    runner = load(tmp_path, weights=weights, kv=DType.F16 if weights == DType.F16 else DType.F32, bf16_inputs=inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(parameter.to(torch_type).float())
    if inputs == "bf16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
    ids = np.random.default_rng(3).integers(0, 203, 100).astype(np.int32)
    # Near the middle of two bf16, an input may round the other way.
    bound = 2e-3 if weights == DType.F16 else 1e-2 if inputs == "bf16" else 1e-4
    assert_close(np.concatenate(list(runner.all_logits(ids))), expected(model, ids), bound=bound)
    runner.close()


@pytest.mark.parametrize(("weights", "inputs"), [(DType.F16, "auto"), (DType.BF16, "bf16"), (DType.BF16, "f32")])
def test_threads_and_instruction_sets_give_the_same_bits(tmp_path: Path, weights: DType, inputs: str) -> None:
    from fabula import _native

    make_checkpoint(tmp_path, "Qwen3", ODD)
    ids = np.random.default_rng(4).integers(0, 203, 300).astype(np.int32)
    results = []
    for isa in get_args(_native.Isa):
        if isa == "auto" or not _native.isa_available(isa):
            continue
        for n_threads in (1, 2, 3):
            if isa == "reference" and n_threads > 1:
                continue
            runner = load(tmp_path, isa=isa, n_threads=n_threads, weights=weights, kv=DType.F16, bf16_inputs=inputs)
            results.append(np.concatenate(list(runner.all_logits(ids))))
            runner.close()
    assert len(results) >= 1
    assert all((result == results[0]).all() for result in results)
