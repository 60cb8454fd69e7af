"""Named arrays as one file in the safetensors format (https://github.com/huggingface/safetensors).

It has arrays and a few texts, and cannot have code: the header's length in 8 bytes, the header as JSON,
the arrays one after another.
"""

import json

import numpy as np

# The names of the format.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint32": "U32",
    "uint64": "U64",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_METADATA = "__metadata__"


def pack(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> list:
    """The contents of a file, in parts: bytes, and the arrays, which must be contiguous."""
    header, offset = {_METADATA: metadata}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (offset, offset + array.nbytes),
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *arrays.values()]


def metadata(data: bytes) -> dict[str, str]:
    """The texts of a file's contents.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: they are none of this format.
    """
    return _header(data)[0][_METADATA]


def unpack(data: bytes, wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file's contents, which are those that are wanted in name, type and shape.

    What is wanted says what is read, so that a file cannot ask for more memory than it has.

    Raises:
        ValueError: the contents are others.
    """
    try:
        header, start = _header(data)
        header.pop(_METADATA, None)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no file of arrays") from None
    expected = {name: (_DTYPES[a.dtype.name], list(a.shape)) for name, a in wanted.items()}
    size = sum(array.nbytes for array in wanted.values())
    if list(found.items()) != list(expected.items()) or len(data) != start + size:
        raise ValueError("it has other arrays than those that are wanted")
    arrays = {}
    for name, array in wanted.items():
        arrays[name] = np.frombuffer(data, array.dtype, array.size, start).reshape(array.shape)
        start += array.nbytes
    return arrays


def _header(data: bytes) -> tuple[dict, int]:
    """(the header, where the arrays begin) of a file's contents."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length
