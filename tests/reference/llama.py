"""A Llama in float64 NumPy, one token at a time: the specification of what the engine computes, sliding included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def rotated(x: F64, position: float, theta: float) -> F64:
    """Heads [n, dim] turned by their position; pair i is elements i and i + dim / 2."""
    half = x.shape[1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)


def logits(
    config: Mapping[str, Any], tensors: Mapping[str, Any], ids: Sequence[int], window: int = 0, n_sinks: int = 0
) -> F64:
    """The logits behind each token, float64 [n, vocab].

    With a window W and S sinks the token at p >= S + W sees the first S positions and the last W, and counts them as
    positions 0 .. S + W - 1, itself the last: the cache positions of StreamingLLM (Xiao et al. 2023).
    """
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    n_heads, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps, theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    past: list[tuple[list[F64], list[F64]]] = [([], []) for _ in range(config["num_hidden_layers"])]

    def norm(x: F64, name: str) -> F64:
        return np.asarray(x / np.sqrt((x**2).mean() + eps) * t[name])

    rows = []
    for p, token in enumerate(ids):
        slid = bool(window) and p >= n_sinks + window
        seen = [*range(n_sinks), *range(p - window + 1, p + 1)] if slid else list(range(p + 1))
        x = t["model.embed_tokens.weight"][token]
        for layer, (keys, values) in enumerate(past):
            name = f"model.layers.{layer}."
            h = norm(x, name + "input_layernorm.weight")
            q, k, v = ((t[f"{name}self_attn.{part}_proj.weight"] @ h).reshape(-1, dim) for part in ("q", "k", "v"))
            keys.append(k)
            values.append(v)
            out = []
            for head in range(n_heads):
                kv = head // (n_heads // n_kv)
                here = rotated(q[head : head + 1], len(seen) - 1 if slid else p, theta)[0]
                scores = np.array(
                    [
                        here @ rotated(keys[j][kv : kv + 1], place if slid else j, theta)[0]
                        for place, j in enumerate(seen)
                    ]
                ) / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out.append((weights / weights.sum()) @ np.array([values[j][kv] for j in seen]))
            x = x + t[name + "self_attn.o_proj.weight"] @ np.concatenate(out)
            h = norm(x, name + "post_attention_layernorm.weight")
            gate, up = (t[f"{name}mlp.{part}_proj.weight"] @ h for part in ("gate", "up"))
            x = x + t[name + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        rows.append(t["lm_head.weight"] @ norm(x, "model.norm.weight"))
    return np.array(rows)
