"""Quantizes f32 to blocks: byte for byte like the gguf package where it has a quantizer, else within stated errors.

llama.cpp's own quantizers, if its library is installed, are a second reference for the formats that search.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fabula import _native
from fabula.errors import InvalidArgument, NonFinite
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import BLOCKS, GgufFile

SIMPLE = [DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0, DType.F16, DType.BF16]
# Relative RMS error on numbers of a normal distribution: measured, plus a tenth.
SEARCHED = {
    DType.Q2_K: 0.31,
    DType.Q3_K: 0.17,
    DType.Q4_K: 0.078,
    DType.Q5_K: 0.039,
    DType.Q6_K: 0.0195,
    DType.IQ4_NL: 0.084,
    DType.MXFP4: 0.123,
}
SMALLEST = np.float32(
    1e-35
)  # of what the simple formats agree on: below, 1 / d is infinite and the package's q undefined


def rows_of(kind: str, n_rows: int = 64, n_cols: int = 768) -> np.ndarray:
    """float32 [n_rows, n_cols] of one distribution."""
    rng = np.random.default_rng(3)
    shape = (n_rows, n_cols)
    made = {
        "normal": lambda: rng.standard_normal(shape),
        "heavy": lambda: rng.standard_t(3, shape) * 0.02,
        "heavier": lambda: rng.standard_t(1.5, shape) * 0.02,
        "laplace": lambda: rng.laplace(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "positive": lambda: rng.uniform(0.5, 1, shape),
    }
    return made[kind]().astype(np.float32)


def error_of(dtype: DType, rows: np.ndarray, raw: np.ndarray) -> float:
    """Relative RMS error of quantized rows."""
    back = _native.dequantize(dtype, raw, rows.size).reshape(rows.shape).astype(np.float64)
    return float(np.sqrt(((back - rows) ** 2).sum() / (rows.astype(np.float64) ** 2).sum()))


def theirs(dtype: DType, rows: np.ndarray) -> np.ndarray:
    """The gguf package's bytes."""
    raw = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[dtype.name])
    return np.ascontiguousarray(raw).view(np.uint8).reshape(-1)


# ---- Formats that round ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "heavy", "heavier", "laplace", "uniform", "positive"])
@pytest.mark.parametrize("dtype", SIMPLE, ids=lambda dtype: dtype.name)
def test_simple_formats_equal_the_package(dtype: DType, kind: str) -> None:
    rows = rows_of(kind)
    assert np.array_equal(_native.quantize(dtype, rows, 2), theirs(dtype, rows))


FINITE = st.floats(-60000.0, 60000.0, width=32)


@pytest.mark.parametrize("dtype", SIMPLE, ids=lambda dtype: dtype.name)
@settings(max_examples=60, deadline=None)
@given(rows=arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=FINITE))
def test_any_row_equals_the_package(dtype: DType, rows: np.ndarray) -> None:
    rows = np.where(np.abs(rows) < SMALLEST, np.float32(0), rows)
    assert np.array_equal(_native.quantize(dtype, rows), theirs(dtype, rows))


# ---- Formats that search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SEARCHED, ids=lambda dtype: dtype.name)
def test_error_on_normal_numbers(dtype: DType) -> None:
    rows = rows_of("normal")
    assert error_of(dtype, rows, _native.quantize(dtype, rows, 2)) < SEARCHED[dtype]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """llama.cpp's library of number formats."""
    spec = importlib.util.find_spec("llama_cpp")
    found = [] if spec is None else list(Path(str(spec.origin)).parent.glob("lib/libggml-base.*"))
    if not found:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    return library


def by_ggml(ggml: ctypes.CDLL, dtype: DType, rows: np.ndarray) -> np.ndarray:
    size, n_bytes = BLOCKS[dtype]
    raw = np.empty(rows.size // size * n_bytes, np.uint8)
    kind = int(gguf.GGMLQuantizationType[dtype.name])
    assert ggml.ggml_quantize_chunk(kind, rows.ctypes.data, raw.ctypes.data, 0, *rows.shape, None) == raw.size
    return raw


@pytest.mark.parametrize("kind", ["normal", "heavy", "heavier", "laplace", "uniform"])
@pytest.mark.parametrize("dtype", SEARCHED, ids=lambda dtype: dtype.name)
def test_error_is_not_above_that_of_ggml(ggml: ctypes.CDLL, dtype: DType, kind: str) -> None:
    rows = rows_of(kind)
    assert error_of(dtype, rows, _native.quantize(dtype, rows, 2)) <= error_of(dtype, rows, by_ggml(ggml, dtype, rows))


@pytest.mark.parametrize("dtype", SEARCHED, ids=lambda dtype: dtype.name)
def test_error_on_a_model_is_not_above_that_of_ggml(ggml: ctypes.CDLL, dtype: DType, smollm2_gguf: Path) -> None:
    with GgufFile(smollm2_gguf) as file:
        tensor = file.tensors["blk.7.ffn_down.weight"]
        raw = file.read(tensor.name)
    # Uneven after quantizing once: its own grid would make one format's levels exact.
    rows = _native.dequantize(tensor.dtype, raw, int(np.prod(tensor.shape))).reshape(-1, 1536)[:128]
    noise = np.random.default_rng(9).standard_normal(rows.shape).astype(np.float32)
    rows = (rows + noise * np.float32(rows.std() / 16))[:, :1536]
    assert error_of(dtype, rows, _native.quantize(dtype, rows, 2)) <= error_of(dtype, rows, by_ggml(ggml, dtype, rows))


HOSTILE = st.one_of(
    st.floats(-60000.0, 60000.0, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-24, 2.0**-25, 1.0, -1.0, 65504.0, -65504.0]),
)


@pytest.mark.parametrize("dtype", SEARCHED, ids=lambda dtype: dtype.name)
@settings(max_examples=80, deadline=None)
@given(
    row=arrays.arrays(np.float32, 256, elements=HOSTILE, fill=st.sampled_from([0.0, 1.0, -3.0, 1e-30, -2e-6])),
    shift=st.integers(-30, 0),
)
def test_any_row_comes_back_near(dtype: DType, row: np.ndarray, shift: int) -> None:
    """No number is further off than a coarse format's step: the whole range of its block over the levels."""
    rows = np.ldexp(row, shift).astype(np.float32).reshape(1, -1)
    back = _native.dequantize(dtype, _native.quantize(dtype, rows), 256)
    assert np.isfinite(back).all()
    largest = float(np.abs(rows).max())
    steps = {
        DType.Q2_K: 1.5, DType.Q3_K: 2.2, DType.IQ4_NL: 4.0, DType.MXFP4: 4.0, DType.Q4_K: 6.0, DType.Q5_K: 12.0,
        DType.Q6_K: 20.0,
    }  # fmt: skip
    # The smallest scales of f16 are 2^-24 apart. Half of that times the largest level, or the largest product of a
    # level and the scale of a sub-block, is what the largest number may be off.
    factors = {DType.Q4_K: 63 * 15, DType.Q5_K: 63 * 31, DType.Q6_K: 128 * 32}
    assert np.abs(back - rows[0]).max() <= largest / steps[dtype] + factors.get(dtype, 127) / 2 * 2.0**-24


@pytest.mark.parametrize("dtype", [*SIMPLE, *SEARCHED], ids=lambda dtype: dtype.name)
def test_quantising_twice_changes_little(dtype: DType) -> None:
    rows = rows_of("normal", 8)
    once = _native.dequantize(dtype, _native.quantize(dtype, rows), rows.size).reshape(rows.shape)
    twice = _native.quantize(dtype, once)
    assert error_of(dtype, once, twice) <= 0.2 * max(error_of(dtype, rows, _native.quantize(dtype, rows)), 1e-3) + 5e-3


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
def test_what_is_not_finite_is_named(dtype: DType) -> None:
    rows = np.ones((5, 512), np.float32)
    rows[3, 300] = np.nan
    with pytest.raises(NonFinite, match="row 3, column 300 holds NaN"):
        _native.quantize(dtype, rows, 3)
    rows[3, 300] = -np.inf
    with pytest.raises(NonFinite, match="row 3, column 300 holds infinity"):
        _native.quantize(dtype, rows, 3)
    rows[3, 300] = 3.4e38
    if dtype is DType.F32:
        assert _native.quantize(dtype, rows).size == rows.nbytes
        return
    with pytest.raises(NonFinite, match=r"row 3, columns? "):
        _native.quantize(dtype, rows, 3)


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(InvalidArgument, match="rows of 576 elements are not whole blocks of 256, as Q4_K needs"):
        _native.quantize(DType.Q4_K, np.ones((2, 576), np.float32))
    with pytest.raises(InvalidArgument, match="dtype is 77"):
        _native.quantize(77, np.ones((2, 576), np.float32))


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)
def test_threads_do_not_matter(dtype: DType) -> None:
    rows = rows_of("heavy", 40)
    assert np.array_equal(_native.quantize(dtype, rows, 1), _native.quantize(dtype, rows, 7))
