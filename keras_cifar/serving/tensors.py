"""Converts between TensorFlow Serving's TensorProto and arrays."""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from keras_cifar.serving.rest import Input, RequestError

BAND = 2**16  # numbers that are converted at a time, so that other threads go on


def array(tensor: tensor_pb2.TensorProto, expected: Input) -> np.ndarray:
    """A request's tensor: object [N] of bytes if a string is expected, else uint8 [N, ...].

    tf.make_ndarray repeats the last value until the shape is full, so a few bytes could ask for any
    amount of memory. Here each value must be there. Raises RequestError for another type or shape.
    """
    dtype = types_pb2.DT_STRING if expected.is_string else types_pb2.DT_UINT8
    if tensor.dtype != dtype:
        kinds = [types_pb2.DataType.Name(kind) for kind in (tensor.dtype, dtype)]
        raise RequestError(
            f"the input {expected.name!r} has type {kinds[0]}; {kinds[1]} is expected"
        )
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    if not shape or shape[0] < 1 or tuple(shape[1:]) != tuple(expected.shape[1:]):
        wanted = f"[{', '.join(map(str, ('N', *expected.shape[1:])))}]"
        raise RequestError(f"the shape is {shape}; {wanted} is expected")
    if expected.is_string:
        values = np.empty(len(tensor.string_val), object)
        values[:] = tensor.string_val
    elif tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, np.uint8)
    else:
        values = _numbers(tensor.int_val)
    if values.size != math.prod(shape):
        raise RequestError(f"the tensor has {values.size} values; its shape is {shape}")
    return values.reshape(shape)


def _numbers(values) -> np.ndarray:
    bands = [np.array(values[i : i + BAND]) for i in range(0, len(values), BAND)]
    if any(band.min() < 0 or band.max() > 255 for band in bands):
        raise RequestError("the values are not integers from 0 to 255")
    return np.concatenate([band.astype(np.uint8) for band in bands] or [np.empty(0, np.uint8)])


def proto(values: np.ndarray) -> tensor_pb2.TensorProto:
    """A TensorProto of an array of numbers, or of object [N] of bytes."""
    tensor = tensor_pb2.TensorProto(dtype=tf.as_dtype(values.dtype).as_datatype_enum)
    for size in values.shape:
        tensor.tensor_shape.dim.add(size=size)
    if values.dtype == object:
        tensor.string_val.extend(values.ravel().tolist())
    else:
        tensor.tensor_content = values.tobytes()
    return tensor
