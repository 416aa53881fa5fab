"""Refuses safetensors weights that another tool quantized, naming the method.

Fabula reads quantized GGUF files and quantizes models itself (`--weights q4`, `fabula quantize`), but of the formats
that other tools write into safetensors files only MXFP4 (`formats/mxfp4.py`). The method is recognized by
`quantization_config` of config.json, by a file in the same folder, or by tensor names.

Source: the `quant_method` names of transformers 5.24 (quantizers/auto.py), and what the tools write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.formats.readfile import read_json_object

_METHODS = {
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "bitnet": "BitNet", "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "eetq": "EETQ", "exl2": "EXL2",
    "exl3": "EXL3", "fbgemm_fp8": "FBGEMM FP8", "fp8": "FP8", "fp_quant": "FP-Quant", "gptq": "GPTQ", "higgs": "HIGGS",
    "hqq": "HQQ", "modelopt": "ModelOpt", "modelopt_fp4": "ModelOpt NVFP4", "quanto": "Quanto",
    "quark": "Quark", "spqr": "SpQR", "torchao": "TorchAO", "vptq": "VPTQ",
}  # fmt: skip
# Files written next to config.json: name, key with the number of bits or the format, method.
_FILES = (
    ("hf_quant_config.json", "quant_algo", "ModelOpt"),
    ("quantize_config.json", "bits", "GPTQ"),
    ("quant_config.json", "w_bit", "AWQ"),
    ("quanto_qmap.json", "", "Quanto"),
)
# Endings of tensor names, the most specific first.
_TENSORS = (
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "ModelOpt NVFP4"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale", "FP8"),
    (".weight.absmax", "bitsandbytes"),
    (".weight.quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".W_q", "HQQ"),
    (".weight._data", "Quanto"),
    (".trellis", "EXL3"),
    (".q_weight", "EXL2"),
    (".scales", "MLX"),
)
_MAX_BYTES = 16_000_000  # some files list every tensor


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses a model that is quantized according to config.json or a file in the same folder.

    Raises:
        Unsupported: it is quantized; names the method and what would work.
        ModelFileError: one of those files is damaged.
    """
    for key in ("quantization_config", "compression_config", "quantization"):
        found = config.get(key)
        if found is None or (isinstance(found, Mapping) and found.get("quant_method") == "mxfp4"):
            continue
        if not isinstance(found, Mapping):
            raise ModelFileError(
                f"{folder / 'config.json'}: config {key!r} is {shown(found)}, must be an object",
                path=folder / "config.json",
                field=key,
            )
        raise _refusal(folder, _method(key, found), f"config.json has {key!r}")
    for name, key, title in _FILES:
        if (folder / name).is_file():
            found = read_json_object(folder / name, max_bytes=_MAX_BYTES)
            inner = found.get("quantization")
            value = (inner if isinstance(inner, Mapping) else found).get(key)
            raise _refusal(folder, title if value is None else _with(title, key, value), f"{name} is next to it")


def refuse_quantized_tensors(names: Iterable[str], path: Path) -> None:
    """Raises Unsupported if tensor names show that the model is quantized."""
    names = list(names)
    for ending, title in _TENSORS:
        if name := next((name for name in names if name.endswith(ending)), None):
            raise _refusal(path, title, f"it has the tensor {shown(name)}")


def _method(key: str, found: Mapping[str, Any]) -> str:
    """The name of a quantization method, with its bits or format if the config has them."""
    name = found.get("quant_method")
    if isinstance(name, str) and name:
        title = _METHODS.get(name.lower(), name[:60])
    elif key == "quantization":
        title = "MLX"
    elif found.get("load_in_4bit") or found.get("load_in_8bit"):
        title = "bitsandbytes"
    elif "quant_algo" in found:
        title = "ModelOpt"
    elif key == "compression_config":
        title = "compressed-tensors"
    else:
        return f"by a method that {key!r} does not name"
    if title == "bitsandbytes":
        bits = 8 if found.get("load_in_8bit") else 4 if found.get("load_in_4bit") else None
        return _with(title, "bits", bits) if bits else title
    for detail in ("bits", "quant_algo", "format", "fmt", "w_bit", "nbits", "weights"):
        if isinstance(value := found.get(detail), str | int) and not isinstance(value, bool):
            return _with(title, detail, value)
    return title


def _with(title: str, key: str, value: object) -> str:
    text = str(value)[:40]
    if text.lower() in title.lower():
        return title
    return f"{title}, {text} bits" if key in ("bits", "w_bit", "nbits") else f"{title}, {text}"


def _refusal(path: Path, method: str, reason: str) -> Unsupported:
    return Unsupported(
        f"{path}: the weights are quantized ({method}): {reason}. Fabula does not read that; take the model as it was"
        " before, in F32, F16 or BF16, and let --weights q4 (or q8 ...) or `fabula quantize` make it small, or take a"
        " .gguf file of it. If the weights are plain after all, remove that entry"
    )
