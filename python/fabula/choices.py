"""Names and limits of the options that the SDK, the server and the command line share.

A leaf: it imports nothing of the package, so that `--help` stays fast.
"""

from __future__ import annotations

from typing import Literal, get_args

DEFAULT_MODEL = "smollm2-135m-instruct"

# "auto" keeps each matrix as in the checkpoint; then the formats of models/recipe.py; then their short names.
WeightsName = Literal[
    "auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0", "q4_k_m", "q4_k", "q4_1", "q4_0",
    "iq4_nl", "mxfp4", "q3_k", "q2_k", "q8", "q6", "q5", "q4", "q3", "q2",
]  # fmt: skip
WEIGHTS_NAMES: tuple[str, ...] = get_args(WeightsName)
# Short names: the format of that size with the least error.
WEIGHTS_ALIASES = {"q8": "q8_0", "q6": "q6_k", "q5": "q5_k_m", "q4": "q4_k_m", "q3": "q3_k", "q2": "q2_k"}
FILE_TYPES = tuple(name for name in WEIGHTS_NAMES if name != "auto" and name not in WEIGHTS_ALIASES)

KV_FORMATS = ("f16", "f32", "bf16", "q8")
KV_NAMES = (*KV_FORMATS, *(f"{k}:{v}" for k in KV_FORMATS for v in KV_FORMATS if k != v))  # for both, or K:V

# KV of windowed layers that no later token sees: kept while there is room, or always dropped.
WindowKv = Literal["keep", "drop"]
WINDOW_KV: tuple[str, ...] = get_args(WindowKv)

# Whether several tokens are guessed and verified in one step: where it pays, or never.
SpeculationName = Literal["auto", "off"]
SPECULATION_NAMES: tuple[str, ...] = get_args(SpeculationName)

# Inputs of products with bf16 weights, on a CPU: rounded to bf16, or f32. "auto": whichever this CPU multiplies faster.
Bf16Inputs = Literal["auto", "bf16", "f32"]
BF16_INPUTS: tuple[str, ...] = get_args(Bf16Inputs)

Isa = Literal[
    "auto", "reference", "avx2", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_amx",
    "neon", "neon_dotprod", "neon_i8mm",
]  # fmt: skip
ISA_NAMES: tuple[Isa, ...] = get_args(Isa)[1:]  # without "auto", the best of them

DEVICE_NAME = r"cpu|auto|cuda(?::([0-9]{1,3}))?"  # pattern of a whole name; the group is the GPU's number
DEVICE_PRODUCTS = ("own", "library")
MAX_DEVICES = 16  # GPUs of one model; FB_MOST_MEMBERS of fabula.h
MAX_THREADS = 1024
