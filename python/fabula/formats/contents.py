"""Describes a folder or file that Fabula cannot load: what it holds, and what would work instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fabula.errors import shown

_CONVERT = (
    "convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
    " writes model.safetensors"
)
_OTHER_FORM = "take the model as safetensors, or as a .gguf file"
_SHOWN = 6  # names listed in a message
_MAX_JSON = 1 << 20  # bytes of a JSON file that is looked into


def describe_folder(folder: Path) -> str | None:
    """What a folder without loadable weights holds and what would work; None if nothing in it is recognized.

    Raises:
        OSError: the folder cannot be read.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    present = set(names)

    def ending(*ends: str) -> list[str]:
        return [name for name in names if name.endswith(ends)]

    def with_(*wanted: str) -> list[str]:
        return [name for name in wanted if name in present]

    safetensors = ending(".safetensors")
    kinds: list[tuple[Sequence[str], Callable[[], str]]] = [
        (
            with_("adapter_config.json"),
            lambda: (
                f"an adapter{_base_of(folder)} without its model (adapter_config.json); Fabula does not apply adapters:"
                " merge it into its base (peft: merge_and_unload(), then save_pretrained) and load what that wrote"
            ),
        ),
        (
            with_("model_index.json"),
            lambda: "a diffusers pipeline (model_index.json), which makes images; Fabula runs language models",
        ),
        (
            with_("params.json") if "config.json" not in present else [],
            lambda: (
                f"weights in Mistral's or Meta's own format ({_list(['params.json', *_consolidated(names)])}); take the"
                " model in Hugging Face's format, or convert it with transformers (its convert_mistral_weights_to_hf.py"
                " or convert_llama_weights_to_hf.py)"
            ),
        ),
        (
            [name for name in safetensors if "config.json" not in present],
            lambda: (
                f"weights ({_list(safetensors)}) without config.json, which says what they are; it belongs to the same"
                " model, in the same folder"
            ),
        ),
        (
            _weights_of_torch(names),
            lambda: (
                f"weights{_family_of(folder)} as pickles ({_list(_weights_of_torch(names))}), which Fabula refuses:"
                f" reading a pickle can run code that is in it; {_CONVERT}"
            ),
        ),
        (
            _consolidated(names),
            lambda: f"weights under other names ({_list(_consolidated(names))}); {_OTHER_FORM}",
        ),
        (ending(".onnx", ".onnx_data"), lambda: f"a model for ONNX ({_list(ending('.onnx'))}); {_OTHER_FORM}"),
        (
            ending(".h5", ".msgpack", ".ckpt.index", ".ot"),
            lambda: (
                "weights for TensorFlow, Flax or Rust"
                f" ({_list(ending('.h5', '.msgpack', '.ckpt.index', '.ot'))}); {_OTHER_FORM}"
            ),
        ),
        (
            [*with_("openvino_model.xml"), *ending(".engine", ".tflite", ".mlpackage", ".mlmodel", ".pte")],
            lambda: f"a model compiled for another engine ({_list(names)}); {_OTHER_FORM}",
        ),
        (with_("weights.npz"), lambda: f"weights for MLX as weights.npz; {_OTHER_FORM}"),
        (
            with_("params.json", "tekken.json") if "config.json" not in present else [],
            lambda: f"a part of a model in Mistral's own format ({_list(with_('params.json', 'tekken.json'))})",
        ),
        (
            _models_in(folder, names),
            lambda: f"one in the folder {_list(_models_in(folder, names))} below; give the path of that",
        ),
        (safetensors, lambda: f"weights under names that are not read ({_list(safetensors)}); {_NAMES}"),
        (
            with_("config.json"),
            lambda: f"config.json{_family_of(folder)} and no weights; download the model again",
        ),
        (
            with_("tokenizer.model", "tokenizer.json", "tekken.json", "vocab.json"),
            lambda: (
                "a tokenizer"
                f" ({_list(with_('tokenizer.model', 'tokenizer.json', 'tekken.json', 'vocab.json'))}) and no weights;"
                " download the model's other files, too"
            ),
        ),
    ]
    for found, words in kinds:
        if found:
            return words()
    return None


_NAMES = "they are looked for in model.safetensors, or in shards that model.safetensors.index.json lists"


def describe_file(path: Path) -> str | None:
    """The same for a file that is neither GGUF nor safetensors."""
    suffix = path.suffix.lower()
    if suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        if _begins_with(path, (b"ggml", b"lmgg", b"fmgg", b"tjgg")):
            return "it is a GGML file from before GGUF; take a .gguf file of the model"
        return f"it is a pickle, which Fabula refuses: reading one can run code that is in it; {_CONVERT}"
    if suffix == ".onnx":
        return f"it is a model for ONNX; {_OTHER_FORM}"
    if suffix in (".h5", ".msgpack", ".npz", ".tflite"):
        return f"it is a model for another engine; {_OTHER_FORM}"
    if path.name == "config.json":
        return "give the path of its folder"
    if path.name.endswith(".safetensors.index.json"):
        return "it only lists the weights; give the path of its folder"
    return None


def _list(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _consolidated(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith("consolidated") and name.endswith((".safetensors", ".pth"))]


def _weights_of_torch(names: Sequence[str]) -> list[str]:
    """Files written by torch.save, without training state."""
    return [
        name
        for name in names
        if name.endswith((".bin", ".pt", ".pth", ".ckpt"))
        and not name.startswith(("training_args", "optimizer", "scheduler", "rng_state", "adapter_model"))
    ]


def _models_in(folder: Path, names: Sequence[str]) -> list[str]:
    """Subfolders, at most two levels down, that hold a config.json with weights or a .gguf file."""
    found = []
    below = [folder / name for name in names if (folder / name).is_dir()][:64]
    for place in [*below, *(inner for outer in below for inner in sorted(outer.iterdir())[:64] if inner.is_dir())]:
        held = [entry.name for entry in place.iterdir()]
        weights = [name for name in held if name.endswith((".safetensors", ".gguf"))]
        if weights and ("config.json" in held or any(name.endswith(".gguf") for name in weights)):
            found.append(str(place.relative_to(folder)))
    return found


def _base_of(folder: Path) -> str:
    base = _text_in(folder / "adapter_config.json", "base_model_name_or_path")
    return f" for {shown(base)}" if base else ""


def _family_of(folder: Path) -> str:
    family = _text_in(folder / "config.json", "model_type")
    return f" of a {shown(family)} model" if family else ""


def _text_in(path: Path, key: str) -> str | None:
    """A string from a small JSON file, for a message; None if the file is damaged."""
    try:
        if path.stat().st_size > _MAX_JSON:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _begins_with(path: Path, magics: Sequence[bytes]) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in magics
    except OSError:
        return False
