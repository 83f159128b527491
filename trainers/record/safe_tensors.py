"""Reads `.safetensors`: 8 bytes with the length of a header, the header in JSON, and the arrays' bytes.

Nothing in such a file is code, and nothing that the header says is believed before it is checked against the file.
Format: https://huggingface.co/docs/safetensors (names, types, shapes and offsets; little-endian, row-major).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
# As other readers have it.
_LONGEST_HEADER = 100_000_000


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name; those of bfloat16 as float32.

    Raises:
      OSError: the file cannot be read.
      ValueError: it does not follow the format; the message says where.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"the header should have {length} bytes, and the file has {size}")
        header = json.loads(file.read(length).decode())
        content = file.read()
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return {name: _array(name, entry, content) for name, entry in header.items() if name != "__metadata__"}


def _array(name: str, entry: Any, content: bytes) -> np.ndarray:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the entry of {name!r} lacks dtype, shape or data_offsets") from None
    if not whole or not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"the entry of {name!r} has dtype {kind!r}, shape {shape} and offsets {[start, stop]}")
    item = np.dtype(_TYPES[kind])
    if not start <= stop <= len(content) or stop - start != math.prod(shape) * item.itemsize:
        raise ValueError(f"{name!r} of shape {shape}, {kind}, does not fit bytes {start} to {stop} of {len(content)}")
    values = np.frombuffer(content[start:stop], item)
    return (widened(values) if kind == "BF16" else values).reshape(shape)


def widened(halves: np.ndarray) -> np.ndarray:
    """bfloat16 as its 16 bits, uint16 → float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
