"""A checkpoint with the tensors as `emit_decoder` names them, whatever form the files have.

    fused       q, k and v in one matrix, gate and up in one: rows of it, stacked or grouped by KV head
    rotation    rotated pairs (2i, 2i + 1) become (i, i + n): rows of q and k change places, and with them their biases
                and norms. Scores are sums over all elements of a head, so they do not change
    transposed  matrices stored as [in, out]
    joined      one vector from several
    offset      norm weights stored as w - 1
    decay       decays stored as logarithms

Blocks of quantized formats run along columns, so rows can be taken from every format.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.errors import ModelFileError, Unsupported
from fabula.formats.checkpoint import Checkpoint, DType, Span, TensorInfo, TensorTable
from fabula.lean_dataclasses import dataclass, field
from fabula.models.description import Attention, DeltaRule, Mamba2, ModelConfig
from fabula.models.latent import SplitLatents, has_joined_latents, orders
from fabula.models.rope import rotated_width
from fabula.models.transposed_experts import TransposedExperts

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor made from others.

    Attributes:
        sources: their names; rows are counted through all of them.
        rows, columns: those taken, in order; None for all. Columns only of formats without blocks.
        n_rows: rows that the sources must have together; None for any number.
        transposed: whether the source is [columns, rows].
        flat: whether the result is a vector.
        offset: added to each number; the result is f32.
        normalized: whether each row is divided by its length; the result is f32.
        decay: whether the result is -exp of the numbers, in f32.
        factors: of all rows, or of each; the result is f32.
    """

    sources: tuple[str, ...]
    rows: Rows | None = None
    n_rows: int | None = None
    transposed: bool = False
    flat: bool = False
    offset: float = 0.0
    normalized: bool = False
    decay: bool = False
    columns: Rows | None = None
    factors: npt.NDArray[np.float32] | None = None

    @property
    def computes(self) -> bool:
        """Whether numbers change, and not only their places."""
        return bool(self.offset) or self.normalized or self.decay or self.factors is not None


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The matrices of experts one below the other."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


class ViewedCheckpoint:
    """A checkpoint whose tensors are views of another's; those that no view uses keep their names.

    A source of several views is read once: its bytes are kept until each of them was read.

    Args:
        checkpoint: source of the tensors.
        views: by canonical name.
    """

    def __init__(self, checkpoint: Checkpoint, views: Mapping[str, View]) -> None:
        self._checkpoint, self._views = checkpoint, views
        self.path: Path = checkpoint.path
        self.format: str = checkpoint.format
        self.config: Mapping[str, Any] = checkpoint.config
        self.metadata: Mapping[str, Any] = checkpoint.metadata
        self._lock = threading.Lock()
        self._held: dict[str, npt.NDArray[np.uint8]] = {}
        self._readers = Counter(source for view in views.values() for source in view.sources)  # still to come
        used = {source for view in views.values() for source in view.sources}
        tensors = {name: info for name, info in checkpoint.tensors.items() if name not in used}
        others: dict[str, str] = {}
        if isinstance(checkpoint.tensors, TensorTable):
            others = {name: why for name, why in checkpoint.tensors.others.items() if name not in used}
        for name, view in views.items():
            tensors[name] = self._describe(name, view)
        self.tensors: Mapping[str, TensorInfo] = TensorTable(self.path, tensors, others)

    def _describe(self, name: str, view: View) -> TensorInfo:
        infos = [self._checkpoint.tensors[source] for source in view.sources]
        first = infos[0]
        shape = _matrix(first.shape)[::-1] if view.transposed else _matrix(first.shape)
        if view.transposed and _native.dtype_block(first.dtype)[0] != 1:
            raise Unsupported(
                f"{self.path}: tensor {first.name!r} is stored as [in, out] in blocks of {first.dtype.name}"
            )
        if any(info.dtype != first.dtype or info.shape[1:] != first.shape[1:] for info in infos):
            raise ModelFileError(
                f"{self.path}: tensors {first.name!r} and the next belong together, but their formats or shapes differ",
                path=self.path,
                field=first.name,
            )
        n_rows = shape[0] if len(infos) == 1 else sum(_matrix(info.shape)[0] for info in infos)
        if view.flat:
            n_rows, shape = n_rows * int(np.prod(shape[1:])), shape[:1]
        if view.n_rows not in (None, n_rows):
            raise ModelFileError(
                f"{self.path}: tensor {first.name!r} has shape {list(first.shape)}, the config asks for"
                f" {view.n_rows} rows",
                path=self.path,
                field=first.name,
            )
        if view.columns is not None and _native.dtype_block(first.dtype)[0] != 1:
            raise Unsupported(
                f"{self.path}: tensor {first.name!r} is in blocks of {first.dtype.name}, and its columns have another"
                " order in the file to be written"
            )
        taken = n_rows if view.rows is None else len(view.rows)
        shape = (taken, *shape[1:])
        if view.computes:
            return TensorInfo(name, DType.F32, shape, 4 * int(np.prod(shape)))
        size, n_bytes = _native.dtype_block(first.dtype)
        return TensorInfo(name, first.dtype, shape, int(np.prod(shape)) // size * n_bytes)

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor; see `Checkpoint.read`."""
        view = self._views.get(name)
        if view is None:
            return self._checkpoint.read(name)
        infos = [self._checkpoint.tensors[source] for source in view.sources]
        size, n_bytes = _native.dtype_block(infos[0].dtype)
        parts = []
        for info in infos:
            raw = self._source(info.name)
            if view.flat or len(info.shape) == 1:
                parts.append(raw.reshape(-1, n_bytes))
            elif view.transposed:
                columns = raw.reshape(info.shape[0], info.shape[1], n_bytes)
                parts.append(np.ascontiguousarray(columns.transpose(1, 0, 2)).reshape(info.shape[1], -1))
            else:
                parts.append(raw.reshape(_matrix(info.shape)[0], -1))
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if view.rows is not None:
            rows = rows[view.rows]
        if view.columns is not None:
            rows = rows.reshape(len(rows), -1, n_bytes)[:, view.columns]
        found = np.ascontiguousarray(rows).reshape(-1)
        if view.offset:
            numbers = _native.dequantize(infos[0].dtype, found, found.size // n_bytes * size)
            return (numbers + np.float32(view.offset)).view(np.uint8)
        if view.factors is not None:
            numbers = _native.dequantize(infos[0].dtype, found, found.size // n_bytes * size)
            scaled = numbers.reshape(len(rows), -1) * view.factors[:, None]
            return np.asarray(scaled, np.float32).reshape(-1).view(np.uint8)
        if view.decay:
            numbers = _native.dequantize(infos[0].dtype, found, found.size // n_bytes * size)
            return np.asarray(-np.exp(numbers), np.float32).view(np.uint8)
        if view.normalized:
            shape = infos[0].shape
            matrix = _native.dequantize(infos[0].dtype, found, int(np.prod(shape))).reshape(shape)
            lengths = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.float32(1e-12))
            return np.asarray(matrix / lengths, np.float32).reshape(-1).view(np.uint8)
        return found

    def span(self, name: str) -> Span | None:
        """See `Checkpoint.span`; a view is in no file."""
        return None if name in self._views else self._checkpoint.span(name)

    def _source(self, name: str) -> npt.NDArray[np.uint8]:
        """A source's bytes."""
        with self._lock:
            self._readers[name] -= 1
            more_come, held = self._readers[name] > 0, self._held.pop(name, None)
        raw = self._checkpoint.read(name) if held is None else held
        if more_come:
            with self._lock:
                self._held[name] = raw
        return raw

    def close(self) -> None:
        """Closes the checkpoint."""
        self._held.clear()
        self._checkpoint.close()


def viewed(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint under canonical names and forms; itself if it has them already."""
    if config.model_type in ("gpt_oss", "llama4_text") and checkpoint.format == "safetensors":
        checkpoint = TransposedExperts(checkpoint, alternate=config.model_type == "gpt_oss")
    if has_joined_latents(checkpoint, config):
        checkpoint = SplitLatents(checkpoint, config)
    views = _Views(checkpoint, config).views
    return ViewedCheckpoint(checkpoint, views) if views else checkpoint


_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


@dataclass
class _Views:
    """Collects the views of a model."""

    checkpoint: Checkpoint
    config: ModelConfig
    views: dict[str, View] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors, c = self.checkpoint.tensors, self.config
        self._names = tensors.all_names if isinstance(tensors, TensorTable) else set(tensors)
        # GGUF files hold what is multiplied.
        self._offset = c.norm_offset if self.checkpoint.format == "safetensors" else 0.0
        self._transposed = c.transposed and self.checkpoint.format == "safetensors"
        for i, layer in enumerate(c.layers):
            prefix = f"model.layers.{i}."
            for kind in ("weight", "bias"):
                self._projections(prefix + "self_attn.", layer.attention, kind)
                self._gate_up(prefix + "mlp.", kind)
                self._gate_up(prefix + "mlp.shared_expert.", kind)
            if not layer.experts:
                self._only_shared(prefix + "mlp.")
            if not layer.attends and not layer.mixer:  # an MLP alone, in Nemotron-H
                self._rename(prefix + "post_attention_layernorm.weight", prefix + "input_layernorm.weight")
            if layer.after_attention and not layer.before_mlp:  # one name for either, in OLMo Hybrid
                self._rename(prefix + "post_self_attn_layernorm.weight", prefix + "post_attention_layernorm.weight")
            correction = prefix + "mlp.gate.e_score_correction_bias"
            if correction in self._names and len(self.checkpoint.tensors[correction].shape) > 1:
                self._add(correction, [correction], flat=True)
            self._head_norms(prefix + "self_attn.", layer.attention)
            if isinstance(layer.mixer, DeltaRule):
                self._delta_rule(prefix + layer.mixer.part, layer.mixer)
            elif isinstance(layer.mixer, Mamba2):
                self._mamba2(prefix + layer.mixer.part)
            for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                self._add(f"{prefix}{name}.weight", [f"{prefix}{name}.weight"], transposed=self._transposed)
            for name in _NORMS:
                self._shift(f"{prefix}{name}.weight")
        for part in ("altup_projections", "altup_unembed_projections") if c.altup else ():
            n, size = c.altup.n - 1 if c.altup else 0, c.hidden_size
            for i in range(n):  # GGUF files have them in one
                rows = np.arange(i * size, (i + 1) * size)
                self._add(f"model.{part}.{i}.weight", [f"model.{part}.weight"], rows, n_rows=n * size)
        if c.offset_final_norm:
            self._shift("model.norm.weight")
        if c.normalized_head:
            self._add("lm_head.weight", ["lm_head.weight"], normalized=True)

    def _add(
        self, name: str, sources: Sequence[str], rows: Rows | None = None, *, transposed: bool = False, **rest: Any
    ) -> None:
        """Adds a view, unless it would be the tensor itself or a source is missing."""
        if not all(source in self._names for source in sources):
            return
        if rows is None and not transposed and list(sources) == [name] and not any(rest.values()):
            return
        self.views[name] = View(tuple(sources), rows, transposed=transposed, **rest)

    def _shift(self, name: str) -> None:
        self._add(name, [name], offset=self._offset)

    def _projections(self, prefix: str, a: Attention, kind: str) -> None:
        if a.latent:
            for part, rows in orders(a, a.latent, self.config.interleaved).items():
                self._add(f"{prefix}{part}.{kind}", [f"{prefix}{part}.{kind}"], rows, n_rows=len(rows))
            return
        fused = f"{prefix}qkv_proj.{kind}"
        transposed = self._transposed and kind == "weight"
        counts = {"q": a.n_heads * a.k_dim, "k": a.n_kv_heads * a.k_dim, "v": a.n_kv_heads * a.v_dim}
        first = 0
        if a.gated and f"{prefix}gate_proj.{kind}" not in self._names:  # behind each q head
            self._gated(prefix, a, kind)
        for part, count in counts.items():
            name = f"{prefix}{part}_proj.{kind}"
            if name in self.views:
                continue
            order = self._order(a, count // a.k_dim) if part != "v" else None
            if fused in self._names:
                rows = np.arange(first, first + count)
                if self.config.qkv == "grouped" and self.checkpoint.format == "safetensors":
                    rows = _grouped(a, part)
                first += count
                rows = rows if order is None else rows[order]
                self._add(name, [fused], rows, transposed=transposed, n_rows=sum(counts.values()))
            elif order is not None or transposed:
                n_rows = None if order is None else count
                self._add(name, [name], order, transposed=transposed, n_rows=n_rows)

    def _order(self, a: Attention, n_heads: int) -> Rows | None:
        """Rows of heads with the rotated pairs apart; None if they are so already."""
        if not self.config.interleaved or a.rope < 0:
            return None
        rope, _ = self.config.ropes[a.rope]
        n = rotated_width(rope, a.k_dim)
        head = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2), np.arange(n, a.k_dim)])
        rows: Rows = (np.arange(n_heads)[:, None] * a.k_dim + head).reshape(-1)
        return rows

    def _gate_up(self, prefix: str, kind: str) -> None:
        fused = f"{prefix}gate_up_proj.{kind}"
        if fused in self._names:
            n_rows = self.checkpoint.tensors[fused].shape[0]
            halves = np.arange(n_rows // 2), np.arange(n_rows // 2, n_rows)
            for part, rows in zip(("gate", "up"), halves, strict=True):
                self._add(f"{prefix}{part}_proj.{kind}", [fused], rows)

    def _rename(self, name: str, source: str) -> None:
        if name not in self._names:
            self._add(name, [source])

    def _only_shared(self, prefix: str) -> None:
        """The shared MLP of a mixture without experts (Granite 4)."""
        shared = prefix + "shared_expert."
        for part in ("gate_proj", "up_proj"):
            if view := self.views.pop(f"{shared}{part}.weight", None):
                self.views[f"{prefix}{part}.weight"] = view
        self._add(prefix + "down_proj.weight", [shared + "down_proj.weight"])

    def _gated(self, prefix: str, a: Attention, kind: str) -> None:
        """q_proj holds, for each head, its queries and its gate."""
        name = f"{prefix}q_proj.{kind}"
        for part, rows in _by_head(a.n_heads, {"q": a.k_dim, "gate": a.v_dim}).items():
            self._add(f"{prefix}{part}_proj.{kind}", [name], rows, n_rows=a.n_heads * (a.k_dim + a.v_dim))

    def _delta_rule(self, prefix: str, m: DeltaRule) -> None:
        """Decays are stored as logarithms; q, k, v and gates may be apart, or side by side for each k head."""
        self._add(prefix + "decay", [prefix + "A_log"], decay=True)
        self._add(prefix + "in_proj_qkv.weight", [f"{prefix}{part}_proj.weight" for part in "qkv"])
        self._add(prefix + "conv1d.weight", [f"{prefix}{part}_conv1d.weight" for part in "qkv"])
        shared = m.n_v_heads // m.n_k_heads
        widths = {"q": m.k_dim, "k": m.k_dim, "v": shared * m.v_dim, "z": shared * m.v_dim}
        rows = _by_head(m.n_k_heads, widths)
        fused, n_rows = prefix + "in_proj_qkvz.weight", m.conv_width + m.inner
        qkv = np.concatenate([rows[part] for part in "qkv"])
        self._add(prefix + "in_proj_qkv.weight", [fused], qkv, n_rows=n_rows)
        self._add(prefix + "in_proj_z.weight", [fused], rows["z"], n_rows=n_rows)
        rows, fused = _by_head(m.n_k_heads, {"b": shared, "a": shared}), prefix + "in_proj_ba.weight"
        for part in "ba":
            self._add(f"{prefix}in_proj_{part}.weight", [fused], rows[part], n_rows=2 * m.n_v_heads)

    def _mamba2(self, prefix: str) -> None:
        """Decays are stored as logarithms. Vectors of GGUF files may be matrices."""
        self._add(prefix + "decay", [prefix + "A_log"], decay=True)
        for name in ("decay", "D", "norm.weight"):
            name = prefix + name
            if name in self._names and len(self.checkpoint.tensors[name].shape) > 1:
                self._add(name, [name], flat=True)

    def _head_norms(self, prefix: str, a: Attention) -> None:
        if a.norm is None or a.norm.weights == "none":
            return
        kinds = ("weight", "bias") if a.norm.biased else ("weight",)
        for (part, n), kind in itertools.product((("q", a.n_heads), ("k", a.n_kv_heads)), kinds):
            name = f"{prefix}{part}_norm.{kind}"
            pieces = [f"{prefix}{part}_norm.norms.{i}.{kind}" for i in range(n)]
            sources = pieces if pieces[0] in self._names else [name]
            if sources[0] not in self._names:
                continue
            order = None if a.norm.rotated else self._order(a, 1 if a.norm.weights == "head" else n)
            flat = len(self.checkpoint.tensors[sources[0]].shape) > 1
            offset = self._offset if kind == "weight" else 0.0
            n_rows = None if order is None else len(order)
            self._add(name, sources, order, flat=flat, offset=offset, n_rows=n_rows)


def _by_head(n_heads: int, widths: Mapping[str, int]) -> dict[str, Rows]:
    """Rows of each part of a matrix that holds, for each head, its rows of all parts."""
    step, first, found = sum(widths.values()), 0, {}
    for part, width in widths.items():
        found[part] = (np.arange(n_heads)[:, None] * step + first + np.arange(width)).reshape(-1)
        first += width
    return found


def _grouped(a: Attention, part: str) -> Rows:
    """Rows of q, k or v in a fused matrix that holds, for each KV head, its query heads, then k, then v."""
    group = a.n_heads // a.n_kv_heads
    firsts = np.arange(a.n_kv_heads)[:, None] * (group + 2) * a.k_dim
    first, n = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}[part]
    return (firsts + first * a.k_dim + np.arange(n * a.k_dim)).reshape(-1)
