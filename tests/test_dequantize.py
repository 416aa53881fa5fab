"""Raw bytes to f32: every number format against the gguf package's decoder, bit by bit.

The bound is zero: both round each product and sum once, in the same order, in f32. Only NaN's sign and
payload are left open, so the scales of random blocks are made finite.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula import _native
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import BLOCKS, GgufFile

# Byte positions of the f16 numbers in a block of each format (native/src/quant/blocks.h). MXFP4's scale is a byte.
SCALES = {
    DType.Q4_0: (0,),
    DType.Q4_1: (0, 2),
    DType.Q5_0: (0,),
    DType.Q5_1: (0, 2),
    DType.Q8_0: (0,),
    DType.Q4_K: (0, 2),
    DType.Q5_K: (0, 2),
    DType.Q6_K: (208,),
    DType.Q2_K: (80, 82),
    DType.Q3_K: (108,),
    DType.IQ4_NL: (0,),
    DType.MXFP4: (),
}
MOST_E = 252  # of MXFP4's scale byte: 12 * 2^(e - 128) is infinite above it
QUANTISED = pytest.mark.parametrize("dtype", SCALES, ids=lambda dtype: dtype.name)


def reference(dtype: DType, raw: np.ndarray) -> np.ndarray:
    """The gguf package's decoding of uint8 [n_blocks, block_bytes], flat."""
    with np.errstate(over="ignore"):  # MXFP4's largest scales
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype.name]).reshape(-1)


def random_blocks(dtype: DType, n_blocks: int, seed: int) -> np.ndarray:
    """Random bytes, uint8 [n_blocks, block_bytes], with every scale a random finite number."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n_blocks, BLOCKS[dtype][1]), dtype=np.uint8)
    for place in SCALES[dtype]:
        sign = rng.integers(0, 2, n_blocks, dtype=np.uint16) << 15
        halfs = rng.integers(0, 0x7C00, n_blocks, dtype=np.uint16) | sign
        raw[:, place : place + 2] = halfs.view(np.uint8).reshape(-1, 2)
    if dtype is DType.MXFP4:
        raw[:, 0] = rng.integers(0, MOST_E + 1, n_blocks)
    return raw


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_blocks_agree_with_the_library() -> None:
    assert set(BLOCKS) == set(DType)
    for dtype, (size, n_bytes) in BLOCKS.items():
        assert _native.dtype_block(dtype) == (size, n_bytes)
        if dtype in SCALES:
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.name]] == (size, n_bytes)
    assert _native.dtype_block(len(DType)) == (0, 0)


@QUANTISED
def test_random_bytes(dtype: DType) -> None:
    raw = random_blocks(dtype, 3000, seed=int(dtype))
    ours = _native.dequantize(dtype, raw.reshape(-1), 3000 * BLOCKS[dtype][0])
    assert np.isfinite(ours).all()
    assert same_bits(ours, reference(dtype, raw))


@QUANTISED
@settings(max_examples=40, deadline=None)
@given(n_blocks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_any_number_of_blocks(dtype: DType, n_blocks: int, seed: int) -> None:
    raw = random_blocks(dtype, n_blocks, seed)
    assert same_bits(_native.dequantize(dtype, raw.reshape(-1), n_blocks * BLOCKS[dtype][0]), reference(dtype, raw))


@QUANTISED
def test_extreme_blocks(dtype: DType) -> None:
    """Bits all clear and all set, with the scales at the ends of the halfs: zeros, subnormals, largest."""
    for fill in (0x00, 0xFF, 0x80, 0x7F):
        for half in (0x0000, 0x8000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00):
            raw = np.full((2, BLOCKS[dtype][1]), fill, np.uint8)
            for place in SCALES[dtype]:
                raw[:, place : place + 2] = np.array([half], np.uint16).view(np.uint8)
            ours = _native.dequantize(dtype, raw.reshape(-1), 2 * BLOCKS[dtype][0])
            assert same_bits(ours, reference(dtype, raw)), (fill, hex(half))


def test_every_scale_of_mxfp4() -> None:
    raw = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 17, axis=1)
    raw[:, 1:] = np.arange(16, dtype=np.uint8) * 0x11
    ours = _native.dequantize(DType.MXFP4, raw.reshape(-1), 256 * 32)
    assert same_bits(ours, reference(DType.MXFP4, raw))
    assert np.isfinite(ours.reshape(256, 32)[: MOST_E + 1]).all()


@pytest.mark.parametrize("dtype", [d for d, at in SCALES.items() if at], ids=lambda dtype: dtype.name)
def test_scales_that_are_not_finite_stay_so(dtype: DType) -> None:
    raw = random_blocks(dtype, 3, seed=5)
    raw[1, SCALES[dtype][0] : SCALES[dtype][0] + 2] = np.array([0x7E00], np.uint16).view(np.uint8)
    blocks = _native.dequantize(dtype, raw.reshape(-1), 3 * BLOCKS[dtype][0]).reshape(3, -1)
    assert np.isnan(blocks[1]).all()
    assert np.isfinite(blocks[[0, 2]]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_data_comes_back(name: str) -> None:
    """Numbers quantized by the gguf package return within a step, plus f16's rounding of d and m."""
    dtype = DType[name]
    values = np.random.default_rng(7).standard_normal((64, 512)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    ours = _native.dequantize(dtype, raw.reshape(-1), values.size)
    assert same_bits(ours, reference(dtype, raw))
    blocks = values.reshape(-1, 32)
    span = blocks.max(axis=1) - blocks.min(axis=1)
    largest = np.abs(blocks).max(axis=1)
    # Step of a block, and how many steps off the worst number may be: Q4_0 and Q5_0 cut one end at q = 15
    # or 31, a whole step below what it should be.
    step, off = {
        "Q4_0": (largest / 8, 1.0),
        "Q5_0": (largest / 16, 1.0),
        "Q4_1": (span / 15, 0.5),
        "Q5_1": (span / 31, 0.5),
        "Q8_0": (largest / 127, 0.5),
    }[name]
    error = np.abs(ours.reshape(-1, 32) - blocks).max(axis=1)
    assert (error <= off * step + 2**-10 * largest).all()


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_plain_formats(dtype: DType) -> None:
    every = np.arange(65536, dtype=np.uint16)
    if dtype is DType.F32:
        raw = np.random.default_rng(1).integers(0, 256, 4 * 4099, dtype=np.uint8)
        wanted = raw.view(np.float32)
    elif dtype is DType.F16:
        raw, wanted = every.view(np.uint8), every.view(np.float16).astype(np.float32)
    else:
        raw, wanted = every.view(np.uint8), (every.astype(np.uint32) << 16).view(np.float32)
    ours = _native.dequantize(dtype, raw, wanted.size)
    numbers = ~np.isnan(wanted)
    assert np.array_equal(ours[numbers].view(np.uint32), wanted[numbers].view(np.uint32))
    assert np.isnan(ours[~numbers]).all()


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
def test_unaligned_sources(dtype: DType) -> None:
    size, n_bytes = BLOCKS[dtype]
    raw = np.random.default_rng(2).integers(0, 120, 33 * n_bytes, dtype=np.uint8)
    wanted = _native.dequantize(dtype, raw, 33 * size)
    for shift in (1, 2, 3, 7):
        moved = np.empty(raw.size + shift, np.uint8)[shift:]
        moved[:] = raw
        assert np.array_equal(_native.dequantize(dtype, moved, 33 * size), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
def test_sizes_that_do_not_fit(dtype: DType) -> None:
    size, n_bytes = BLOCKS[dtype]
    raw = np.zeros(2 * n_bytes, np.uint8)
    assert _native.dequantize(dtype, raw[:0], 0).shape == (0,)
    for wrong in (raw[: n_bytes - 1], raw[: n_bytes + 1], raw, raw[:0]):
        with pytest.raises(InvalidArgument, match="src_bytes"):
            _native.dequantize(dtype, wrong, size)
    if size > 1:
        with pytest.raises(InvalidArgument, match="n_elements"):
            _native.dequantize(dtype, raw[:n_bytes], size - 1)
    with pytest.raises(InvalidArgument, match=f"dtype is {len(DType)}"):
        _native.dequantize(len(DType), raw, 1)


def test_smollm2_dequantises_whole(smollm2_gguf: Path) -> None:
    n_elements = 0
    with GgufFile(smollm2_gguf) as file:
        for i, (name, tensor) in enumerate(file.tensors.items()):
            raw = file.read(name)
            n = int(np.prod(tensor.shape))
            values = _native.dequantize(tensor.dtype, raw, n)
            assert np.isfinite(values).all()
            if i % 20 == 3 and tensor.dtype in SCALES:
                assert same_bits(values, reference(tensor.dtype, raw.reshape(-1, BLOCKS[tensor.dtype][1]))), name
            n_elements += n
    assert n_elements == 134_515_008
