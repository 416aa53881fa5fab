"""`fabula inspect`: describes a model without loading its weights."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import click

from fabula.choices import DEFAULT_MODEL
from fabula.cli.console import FetchProgress, bars

if TYPE_CHECKING:
    from fabula.formats.checkpoint import Checkpoint, TensorInfo
    from fabula.models.description import Experts, ModelConfig

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.")
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_ARITHMETIC = {
    "bf16": "BF16 weights take inputs rounded to bf16 on this CPU; --bf16-inputs f32 gives the results of others",
    "f32": "BF16 weights take inputs in f32 on this CPU; --bf16-inputs bf16 gives the results of AVX-512 BF16",
}


@click.command(short_help="Describe a model without loading its weights.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, tensors: bool, template: bool, as_json: bool) -> None:
    """Show whether MODEL runs, its family, shapes, sizes in memory, tokenizer and chat template.

    A model that does not run is refused with what is missing, as by every command.

    \b
    Examples:
      fabula inspect
      fabula inspect ./model.gguf --tensors
      fabula inspect ./my-model --json
      fabula inspect --template
    """
    from fabula.engine.defaults import read_defaults
    from fabula.formats.locate import locate
    from fabula.model import check_vocabulary, load_tokenizer
    from fabula.models.opening import check_tensors, open_model

    with bars() as bar:
        path = locate(model, progress=FetchProgress(bar, f"fetching {model}"))
    checkpoint, config = open_model(path)
    try:
        tokenizer = load_tokenizer(checkpoint)
        check_vocabulary(tokenizer, config, checkpoint.path)
        check_tensors(checkpoint, config)
        if template:
            click.echo(json.dumps(tokenizer.chat_template) if as_json else tokenizer.chat_template or "")
            return
        facts = describe(checkpoint)
        facts["tokenizer"] = {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_ids": list(tokenizer.eos_ids),
            "adds_bos": tokenizer.add_bos,
            "special_tokens": tokenizer.special_tokens,
        }
        facts["chat_template"] = tokenizer.chat_template
        defaults = read_defaults(checkpoint)
        facts["sampling_defaults"] = defaults.to_json()
        if tensors:
            facts["tensors"] = [
                {"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape), "n_bytes": info.n_bytes}
                for info in checkpoint.tensors.values()
            ]
    finally:
        checkpoint.close()
    if as_json:
        click.echo(json.dumps(facts))
    else:
        _print(facts, defaults.summary())


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about a checkpoint, with its sizes on disk and in memory by precision."""
    from fabula._native import inputs_of_bf16, page_bytes, state_bytes
    from fabula.engine.runner import PREFILL_CHUNK
    from fabula.formats.checkpoint import DType
    from fabula.kv.format import kv_dtypes
    from fabula.kv.pages import pages_for
    from fabula.kv.windowed import WindowedLayers
    from fabula.models.decoder import has_head
    from fabula.models.families import family_of

    family = family_of(checkpoint.config, checkpoint.path)
    config = family.read(checkpoint.config, checkpoint.path)
    infos = list(checkpoint.tensors.values())
    if config.tied:
        infos = [info for info in infos if info.name != "lm_head.weight"]
    matrices = sum(math.prod(info.shape) for info in infos if len(info.shape) > 1)
    vectors = sum(math.prod(info.shape) for info in infos if len(info.shape) < 2)
    shares = [_share(info, config) for info in infos]
    on_disk: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        on_disk[info.dtype.name] = on_disk.get(info.dtype.name, 0) + info.n_bytes
    as_it_is = sum(info.n_bytes for info in infos if len(info.shape) > 1)
    kv_numbers = sum(layer.n_kv_heads * (layer.k_dim + layer.v_dim) for layer in config.kv_layers)
    kv_bytes = {name: kv_numbers * _BYTES[name] for name in ("f32", "f16")}
    windowed, n_pages = WindowedLayers.of(config.kv_windows), pages_for(config.context_length)
    context_bytes = {
        name: {
            "keep": n_pages * page_bytes(kv_dtypes(name), config.kv_layers),
            "drop": windowed.text_bytes(kv_dtypes(name), config.kv_layers, n_pages, PREFILL_CHUNK),
        }
        for name in kv_bytes
    }
    window = max(config.windows, default=0)
    return {
        "runs": True,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": family.name,
        "n_parameters": matrices + vectors,
        "n_active_parameters": int(
            sum(share * math.prod(info.shape) for info, share in zip(infos, shares, strict=True))
        ),
        "active_bytes": int(sum(share * info.n_bytes for info, share in zip(infos, shares, strict=True))),
        "n_experts": max((e.router.n_experts for e in _experts(config)), default=0),
        "n_chosen_experts": max((e.router.n_chosen for e in _experts(config)), default=0),
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "sliding_window": window or None,
        "n_windowed_layers": sum(each > 0 for each in config.windows),
        "tied_embeddings": config.tied,
        "has_head": has_head(checkpoint, config),
        "left_out": list(config.left_out),
        "rope": dict(config.rope),
        "ropes": [dict(rope) for rope, _ in config.ropes],
        "bytes_on_disk": on_disk,
        "bytes_in_memory": {"auto": as_it_is + 4 * vectors}
        | {name: matrices * size + 4 * vectors for name, size in _BYTES.items()},
        "bf16_inputs": inputs_of_bf16("auto")
        if any(len(i.shape) > 1 and i.dtype is DType.BF16 for i in infos)
        else None,
        "kv_bytes_per_token": kv_bytes,
        "kv_bytes_per_1000_tokens": {name: 1000 * n_bytes for name, n_bytes in kv_bytes.items()},
        "kv_bytes_of_context": context_bytes,
        "n_recurrent_layers": sum(layer.mixer is not None for layer in config.layers),
        "state_bytes": state_bytes(config.state_layers) if config.state_layers else 0,
    }


def _experts(config: ModelConfig) -> list[Experts]:
    return [layer.experts for layer in config.layers if layer.experts]


def _share(info: TensorInfo, config: ModelConfig) -> float:
    """The share of a tensor that one token reads: of experts the chosen ones, of an embedding that is not the head too
    one row, of all others the whole."""
    if info.name == "model.embed_tokens.weight" and not config.tied:
        return 1 / info.shape[0]
    match = _EXPERTS.match(info.name)
    experts = config.layers[int(match[1])].experts if match and int(match[1]) < config.n_layers else None
    return experts.router.n_chosen / experts.router.n_experts if experts else 1.0


def _print(facts: dict[str, Any], sampling: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def size(n_bytes: int) -> str:
        return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"

    tokens = facts["tokenizer"]
    names = {number: name for name, number in tokens["special_tokens"].items()}
    bos = "none" if tokens["bos_id"] is None else f"{tokens['bos_id']} {names.get(tokens['bos_id'], '')}".strip()
    template = facts["chat_template"]
    ropes = [
        ", ".join(f"{key} {value}" for key, value in rope.items() if not isinstance(value, list))
        for rope in facts["ropes"]
    ]
    windowed = facts["n_windowed_layers"]
    part = f" in {windowed} layers" if windowed < facts["n_layers"] else ""
    runs = f"yes, in {size(facts['bytes_in_memory']['auto'])} as it is, and "
    runs += f"{size(facts['kv_bytes_per_1000_tokens']['f16'])} for every 1,000 tokens of context (f16)"
    kv_of_context = "; ".join(
        f"{name} {size(each['keep'])}" + (f", {size(each['drop'])} without dead windows" if windowed else "")
        for name, each in facts["kv_bytes_of_context"].items()
    )
    rows = [
        ("runs", runs),
        ("file", f"{facts['path']} ({facts['format']})"),
        ("family", f"{facts['family']}, {facts['n_parameters'] / 1e6:,.1f} M parameters"),
        *(
            [
                (
                    "experts",
                    f"{facts['n_chosen_experts']} of {facts['n_experts']} in a layer: a token reads"
                    f" {facts['n_active_parameters'] / 1e6:,.1f} M parameters, {size(facts['active_bytes'])}",
                )
            ]
            if facts["n_experts"]
            else []
        ),
        ("layers", f"{facts['n_layers']} of hidden size {facts['hidden_size']}, MLP {facts['intermediate_size']}"),
        ("heads", f"{facts['n_heads']} of {facts['head_dim']}, {facts['n_kv_heads']} for keys and values"),
        (
            "vocabulary",
            f"{facts['vocab_size']:,}{', tied' if facts['tied_embeddings'] else ''}"
            + ("" if facts["has_head"] else ", no head: for embeddings only"),
        ),
        (
            "context",
            f"{facts['context_length']:,} tokens"
            + (f", window {facts['sliding_window']}{part}" if facts["sliding_window"] else ""),
        ),
        ("rope", "; ".join(ropes) or "none: positions are learned"),
        *([("left out", f"{' and '.join(facts['left_out'])}: it reads text only")] if facts["left_out"] else []),
        ("on disk", ", ".join(f"{name} {size(n)}" for name, n in facts["bytes_on_disk"].items())),
        ("in memory", ", ".join(f"{name} {size(n)}" for name, n in facts["bytes_in_memory"].items())),
        *([("arithmetic", _ARITHMETIC[facts["bf16_inputs"]])] if facts["bf16_inputs"] else []),
        ("KV per token", ", ".join(f"{name} {size(n)}" for name, n in facts["kv_bytes_per_token"].items())),
        ("KV of context", kv_of_context),
        *(
            [
                (
                    "states",
                    f"{size(facts['state_bytes'])} of recurrent layers, for each place that a text can go on from",
                )
            ]
            if facts["state_bytes"]
            else []
        ),
        ("tokenizer", f"{tokens['kind']}, {tokens['vocab_size']:,} tokens, {len(names)} of them control tokens"),
        ("start token", bos + (", added to texts" if tokens["adds_bos"] else "")),
        ("end tokens", ", ".join(f"{i} {names.get(i, '')}".strip() for i in tokens["eos_ids"]) or "none"),
        ("sampling", sampling),
        ("chat template", f"{len(template):,} characters (--template prints it)" if template else "none"),
    ]
    console = Console(highlight=False, soft_wrap=True)
    for name, value in rows:
        console.print(Text(f"{name:14}", style="bold") + Text(value, style="not bold"))
    if "tensors" in facts:
        table = Table("tensor", "type", "shape", "bytes", box=None, pad_edge=False, header_style="bold")
        for info in facts["tensors"]:
            table.add_row(info["name"], info["dtype"], " x ".join(map(str, info["shape"])), f"{info['n_bytes']:,}")
        console.print(table)
