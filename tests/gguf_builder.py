"""Writes GGUF files byte by byte, valid and invalid ones: every field can be set.

`Key` and `Tensor` serialize themselves; `build` combines them. A field that is None gets its correct value, so a test
breaks one thing and leaves the rest valid. `small_keys` and `small_tensors` are a whole model of two layers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
FORMATS = {
    UINT8: "<B", INT8: "<b", UINT16: "<H", INT16: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<B",
    UINT64: "<Q", INT64: "<q", FLOAT64: "<d",
}  # fmt: skip

# ggml's tensor types: number -> (elements, bytes) of a block.
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30
Q2_K, Q3_K, IQ4_NL = 10, 11, 20
BLOCKS = {
    F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q5_0: (32, 22), Q5_1: (32, 24),
    Q8_0: (32, 34), Q4_K: (256, 144), Q5_K: (256, 176), Q6_K: (256, 210), Q2_K: (256, 84), Q3_K: (256, 110),
    IQ4_NL: (32, 18),
}  # fmt: skip


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` replaces the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: object) -> bytes:
    return string(value) if kind == STRING else struct.pack(FORMATS[kind], value)  # type: ignore[arg-type]


def array(kind: int, values: Sequence[object], count: int | None = None) -> bytes:
    """The payload of an ARRAY; `count` replaces the true number of items."""
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    return head + b"".join(scalar(kind, value) for value in values)


@dataclass
class Key:
    """A key-value: `payload` is the value's bytes after its type."""

    name: str | bytes
    kind: int
    payload: bytes

    def pack(self) -> bytes:
        return string(self.name) + struct.pack("<I", self.kind) + self.payload


def key(name: str, kind: int, value: object) -> Key:
    return Key(name, kind, scalar(kind, value))


@dataclass
class Tensor:
    """A tensor of zeros, or of `data`; dims in GGUF's order, fastest first."""

    name: str | bytes
    dims: Sequence[int]
    kind: int = F32
    data: bytes | None = None
    offset: int | None = None
    n_dims: int | None = None

    def bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        size, n_bytes = BLOCKS.get(self.kind, (1, 4))
        return bytes(int(np.prod(self.dims)) // size * n_bytes)

    def pack(self, offset: int) -> bytes:
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        dims = b"".join(struct.pack("<Q", dim % 2**64) for dim in self.dims)
        place = offset if self.offset is None else self.offset
        return string(self.name) + struct.pack("<I", n_dims) + dims + struct.pack("<IQ", self.kind, place)


@dataclass
class Parts:
    """A file in two pieces; between them lies the padding to the alignment."""

    header: bytes
    data: bytes = b""
    alignment: int = 32

    @property
    def file(self) -> bytes:
        return self.header + bytes(-len(self.header) % self.alignment) + self.data


def build_parts(
    keys: Sequence[Key] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
    data_bytes: int | None = None,
) -> Parts:
    """Puts a file together. `data_bytes` cuts or lengthens the data, for tensors too large to write."""
    head = magic + struct.pack("<I", version)
    head += struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors)
    head += struct.pack("<Q", len(keys) if n_keys is None else n_keys)
    head += b"".join(k.pack() for k in keys)
    data = b""
    for tensor in tensors:
        head += tensor.pack(len(data))
        if data_bytes is None:
            data += tensor.bytes()
            data += bytes(-len(data) % alignment)
    return Parts(head, data if data_bytes is None else bytes(data_bytes), alignment)


def build(keys: Sequence[Key] = (), tensors: Sequence[Tensor] = (), **overrides: object) -> bytes:
    """The bytes of a file; see build_parts."""
    return build_parts(keys, tensors, **overrides).file  # type: ignore[arg-type]


# ---- A whole small model ------------------------------------------------------------------------------

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 8, 64, 96, 4, 2, 2


def small_keys(arch: str = "llama") -> list[Key]:
    """Key-values of a model with 2 layers, 4 heads of 16, 2 KV heads and 8 tokens."""
    return [
        key("general.architecture", STRING, arch),
        key(f"{arch}.block_count", UINT32, LAYERS),
        key(f"{arch}.context_length", UINT32, 128),
        key(f"{arch}.embedding_length", UINT32, HIDDEN),
        key(f"{arch}.feed_forward_length", UINT32, FFN),
        key(f"{arch}.attention.head_count", UINT32, HEADS),
        key(f"{arch}.attention.head_count_kv", UINT32, KV_HEADS),
        key(f"{arch}.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        key(f"{arch}.rope.freq_base", FLOAT32, 10000.0),
        Key("tokenizer.ggml.tokens", ARRAY, array(STRING, [f"<{i}>" for i in range(VOCAB)])),
        Key("tokenizer.ggml.token_type", ARRAY, array(INT32, [1] * VOCAB)),
        key("tokenizer.ggml.bos_token_id", UINT32, 1),
        key("tokenizer.ggml.eos_token_id", UINT32, 2),
    ]


def small_tensors(arch: str = "llama", kind: int = F32, seed: int = 0) -> list[Tensor]:
    """Its tensors, norms in F32 and matrices in `kind`, filled with random bytes."""
    rng = np.random.default_rng(seed)
    head_dim = HIDDEN // HEADS

    def make(name: str, dims: list[int], kind: int) -> Tensor:
        tensor = Tensor(name, dims, kind)
        tensor.data = rng.integers(0, 256, len(tensor.bytes()), dtype=np.uint8).tobytes()
        return tensor

    matrices = {
        "attn_q": [HIDDEN, HIDDEN],
        "attn_k": [HIDDEN, KV_HEADS * head_dim],
        "attn_v": [HIDDEN, KV_HEADS * head_dim],
        "attn_output": [HIDDEN, HIDDEN],
        "ffn_gate": [HIDDEN, FFN],
        "ffn_up": [HIDDEN, FFN],
        "ffn_down": [FFN, HIDDEN],
    }
    vectors = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    if arch == "qwen3":
        vectors |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim}
    tensors = [make("token_embd.weight", [HIDDEN, VOCAB], kind), make("output_norm.weight", [HIDDEN], F32)]
    for layer in range(LAYERS):
        for name, size in vectors.items():
            tensors.append(make(f"blk.{layer}.{name}.weight", [size], F32))
        for name, dims in matrices.items():
            tensors.append(make(f"blk.{layer}.{name}.weight", dims, kind))
        if arch == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                tensors.append(make(f"blk.{layer}.{name}.bias", [matrices[name][1]], F32))
    return tensors


def replaced(keys: Sequence[Key], new: Key | None, name: str | None = None) -> list[Key]:
    """`keys` with the one of that name replaced, added where none was, or, for None, left out."""
    name = name if new is None else str(new.name)
    kept = [k for k in keys if k.name != name]
    return kept if new is None else [*kept, new]


def writer(folder: Path) -> Callable[[bytes], Path]:
    """A function that writes bytes to a file in a folder and returns its path."""

    def write(raw: bytes) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(raw)
        return path

    return write
