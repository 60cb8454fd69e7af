"""Named arrays and texts as the contents of one safetensors file, which cannot hold code."""

import json

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy


def save(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The contents of a file; the arrays must be contiguous."""
    return safetensors_numpy.save(arrays, metadata)


def load_metadata(data: bytes) -> dict[str, str]:
    """The texts in a file's contents; safetensors itself reads them from a path only.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: the contents are not in this format.
    """
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def load_all(data: bytes) -> dict[str, np.ndarray]:
    """The arrays in a file's contents; raises ValueError if they are not in this format."""
    try:
        return safetensors_numpy.load(data)
    except safetensors.SafetensorError:
        raise ValueError("it is not a safetensors file") from None
    except KeyError as error:
        raise ValueError(f"NumPy has no type {error}; save it as float32") from None


def load(data: bytes, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in a file's contents, in the order of `expected`.

    Raises:
        ValueError: the contents are not in this format, or the arrays differ from `expected` in
            name, shape or dtype.
    """
    found = load_all(data)
    layouts = [{k: (a.dtype, a.shape) for k, a in each.items()} for each in (found, expected)]
    if layouts[0] != layouts[1]:
        raise ValueError("its arrays are not the expected ones")
    return {name: found[name] for name in expected}
