"""Number formats of the KV cache: names such as "f16" for both, or "q8:f16" for K and V each."""

from __future__ import annotations

from fabula.choices import KV_FORMATS, KV_NAMES
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType

_DTYPES = dict(zip(KV_FORMATS, (DType.F16, DType.F32, DType.BF16, DType.Q8_0), strict=True))


def kv_dtypes(name: object) -> tuple[DType, DType]:
    """The formats of K and of V. "q8" is 8-bit with a scale per position and head: 8.5 bits a number in heads of 64.

    Raises:
        InvalidArgument: unknown name.
    """
    k, _, v = name.partition(":") if isinstance(name, str) else ("", "", "")
    if name not in KV_NAMES:
        one = ", ".join(KV_FORMATS)
        raise InvalidArgument(f"kv is {name!r}, must be one of {one}, or two of them as K:V, such as q8:f16")
    return _DTYPES[k], _DTYPES[v or k]
