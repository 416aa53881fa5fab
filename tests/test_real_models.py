"""Fabula against transformers on real models: the same words, not only close numbers.

SmolLM2 comes from a quantized GGUF file; both sides compute with its dequantized weights in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fabula import _native
from fabula.engine.sampling import SamplingParams
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.open import open_checkpoint
from fabula.model import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

F32 = npt.NDArray[np.float32]
PLAIN = "The lighthouse stood at the end of the long stone pier, and every evening"
CHAT = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]
TEXT = Path(__file__).parent / "data" / "lighthouse.txt"


def dequantised(checkpoint: Checkpoint, name: str) -> F32:
    info = checkpoint.tensors[name]
    return _native.dequantize(info.dtype, checkpoint.read(name), int(np.prod(info.shape))).reshape(info.shape)


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    """transformers' Llama with the numbers Fabula reads from the GGUF file."""
    checkpoint = open_checkpoint(smollm2_gguf)
    try:
        config = transformers.LlamaConfig(**{k: v for k, v in checkpoint.config.items() if k != "architectures"})
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        model = model.to_empty(device="cpu").eval()
        state = {name: torch.from_numpy(dequantised(checkpoint, name)) for name in checkpoint.tensors}
    finally:
        checkpoint.close()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    # Frequencies are no part of the state; to_empty left them undefined.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model


@pytest.fixture(scope="module")
def smollm2_f32(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf, weights="f32", kv="f32", threads=2, context=512) as model:
        yield model


def their_logits(model: Any, ids: Sequence[int]) -> F32:
    with torch.no_grad():
        logits: F32 = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def their_greedy(model: Any, ids: Sequence[int], n: int) -> list[int]:
    """Greedy continuation token by token, with transformers' own KV cache."""
    drawn: list[int] = []
    past, step = None, torch.tensor([list(ids)])
    with torch.no_grad():
        while len(drawn) < n:
            out = model(step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            drawn.append(int(out.logits[0, -1].argmax()))
            step = torch.tensor([[drawn[-1]]])
    return drawn


def relative(ours: F32, theirs: F32) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def our_greedy(model: Model, ids: Sequence[int], n: int, *, ignore_eos: bool = False) -> list[int]:
    generation = model.generate(ids, SamplingParams(temperature=0, max_tokens=n, ignore_eos=ignore_eos))
    generation.text()
    return generation.token_ids


# ---- SmolLM2


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_smollm2_says_what_transformers_says(kind: str, smollm2_f32: Model, reference: Any) -> None:
    ids = smollm2_f32.chat_ids(CHAT) if kind == "chat" else smollm2_f32.tokenizer.encode(PLAIN)
    ours = our_greedy(smollm2_f32, ids, 64)
    theirs = their_logits(reference, ids + ours)
    assert relative(smollm2_f32.logits(ids), theirs[: len(ids)]) <= 1e-4
    # One pass over prompt and answer: where each token is the likeliest after those before it, greedy decoding by
    # transformers gives this very text.
    assert theirs[len(ids) - 1 : -1].argmax(axis=1).tolist() == ours
    assert len(ours) == 64 or ours[-1] in smollm2_f32.tokenizer.eos_ids
    assert len(set(ours)) >= 10


@pytest.mark.heavy
def test_the_gguf_file_is_read_as_transformers_reads_it(smollm2_gguf: Path, reference: Any) -> None:
    """transformers has a reader of its own (on gguf-py): the same names, rows in the same order, the same numbers."""
    pytest.importorskip("gguf")
    own = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs, ours = own.state_dict(), reference.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.fixture(scope="module")
def hundred_tokens(smollm2_f32: Model) -> list[int]:
    return smollm2_f32.tokenizer.encode(TEXT.read_text()[:2000])[:100]


def test_f16_stays_close_to_f32(smollm2_gguf: Path, smollm2_f32: Model, hundred_tokens: list[int]) -> None:
    exact = smollm2_f32.logits(hundred_tokens).astype(np.float64)
    with Model.load(smollm2_gguf, weights="f16", kv="f16", threads=2, context=512) as model:
        half = model.logits(hundred_tokens).astype(np.float64)

    def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(half)
    divergence = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    difference = float(np.abs(exact - half).max() / np.abs(exact).max())
    # Measured: 3.1e-6 and 1.6e-3. What f16's 11 bits cost in 30 layers, and about three times that as the bound.
    assert 0 <= divergence <= 1e-5
    assert difference <= 5e-3


def test_threads_and_chunks_give_the_same_bits(smollm2_gguf: Path, hundred_tokens: list[int]) -> None:
    results = []
    for threads in (1, 2):
        with Model.load(smollm2_gguf, weights="f16", threads=threads, context=512) as model:
            results.append(model.logits(hundred_tokens))
            if threads == 2:
                for chunk in (7, 64):
                    model._runner.max_tokens = chunk  # tokens of one step
                    results.append(model.logits(hundred_tokens))
    for other in results[1:]:
        assert (other == results[0]).all()


# ---- The story model


def test_a_story_is_transformers_story(story_folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(story_folder, dtype=torch.float32).eval()
    with Model.load(story_folder, weights="f32", kv="f32", threads=2) as model:
        start = model.tokenizer.bos_id
        assert start is not None
        ours = our_greedy(model, [start], 300, ignore_eos=True)
        assert ours == their_greedy(theirs, [start], 300)
        assert len(ours) == 300
        ids = [start, *ours]
        assert relative(model.logits(ids), their_logits(theirs, ids)) <= 1e-4
        assert len(model.tokenizer.decode(ours).split()) > 100
