"""Converts between TensorFlow Serving's JSON and arrays: request body -> array, arrays -> response.

See https://www.tensorflow.org/tfx/serving/api_rest. The row format (`instances`) and the column format
(`inputs`), for signatures of one input, as all of ours are.
"""

import base64
import dataclasses
import json
import typing

import numpy as np

from keras_cifar.core.errors import reason

DEFAULT_SIGNATURE = "serving_default"


class RequestError(Exception):
    """A request that cannot be answered; the client gets the message and the HTTP `status`."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Input(typing.NamedTuple):
    """The single input of a signature."""

    name: str
    shape: tuple  # with None for the rows
    is_string: bool  # or uint8


@dataclasses.dataclass(frozen=True)
class Call:
    """A request to predict."""

    signature: str
    by_rows: bool  # whether request and response are in row format
    values: object = None  # the JSON of the input


def decode(body: bytes, inputs: dict[str, Input]) -> tuple[Call, np.ndarray]:
    """(a request's call without its values, its input as `tensor` returns it).

    `inputs` has the input of each signature. Raises RequestError if the request fits none.
    """
    call = parse(body)
    array = tensor(call, *input_of(inputs, call.signature))
    return dataclasses.replace(call, values=None), array


def input_of(inputs: dict[str, Input], signature: str, status: int = 400) -> Input:
    """The input of a signature; raises RequestError with a status if there is no such signature."""
    if signature not in inputs:
        names = ", ".join(sorted(inputs))
        raise RequestError(f"there is no signature {signature!r}; the model has: {names}", status)
    return inputs[signature]


def parse(body: bytes) -> Call:
    """Parses a request's body; raises RequestError if it is not a request to predict in JSON."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {reason(error)}") from None
    if type(request) is not dict:
        raise RequestError("the request is not a JSON object")
    signature = request.get("signature_name", "")
    if type(signature) is not str:
        raise RequestError('"signature_name" is not a string')
    if ("instances" in request) == ("inputs" in request):
        raise RequestError('the request must have one of "instances" and "inputs"')
    by_rows = "instances" in request
    values = request["instances" if by_rows else "inputs"]
    return Call(signature or DEFAULT_SIGNATURE, by_rows, values)


def tensor(call: Call, name: str, shape: tuple, is_string: bool) -> np.ndarray:
    """The input of a call: object [N] of bytes if `is_string`, else uint8 [N, *shape[1:]].

    `name` is that of the signature's input. Raises RequestError for another type or shape.
    """
    values = call.values
    if call.by_rows:
        if type(values) is not list:
            raise RequestError('"instances" is not a list')
        if any(_is_named(value) for value in values):
            values = [_unnamed(value, name, f"instance {i}") for i, value in enumerate(values)]
    elif _is_named(values):
        values = _unnamed(values, name, '"inputs"')
    if type(values) is not list or not values:
        raise RequestError("the request has no values")
    return _strings(values) if is_string else _pixels(values, shape)


def _is_named(value: object) -> bool:
    """Whether a value is {input name: value}; {"b64": ...} is a value itself."""
    return type(value) is dict and value.keys() != {"b64"}


def _unnamed(value: object, name: str, where: str) -> object:
    if not _is_named(value) or value.keys() != {name}:
        found = ", ".join(map(repr, value)) if _is_named(value) else "a value without a name"
        raise RequestError(f"{where} must have only the input {name!r}, and has {found or 'none'}")
    return value[name]


def _strings(values: list) -> np.ndarray:
    strings = np.empty(len(values), object)
    for index, value in enumerate(values):
        try:
            if type(value) is dict and value.keys() == {"b64"} and type(value["b64"]) is str:
                strings[index] = base64.b64decode(value["b64"], validate=True)
            elif type(value) is str:
                strings[index] = value.encode()
            else:
                raise ValueError('neither a string nor {"b64": string}')
        except ValueError as error:
            raise RequestError(f"instance {index}: {reason(error)}") from None
    return strings


def _pixels(values: list, shape: tuple) -> np.ndarray:
    wanted = f"[N, {', '.join(map(str, shape[1:]))}]"
    try:
        array = np.array(values)
    except ValueError:
        raise RequestError(f"the values have no shape; {wanted} is expected") from None
    if array.shape[1:] != tuple(shape[1:]):
        raise RequestError(f"the shape is {list(array.shape)}; {wanted} is expected")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise RequestError("the values are not integers from 0 to 255")
    return array.astype(np.uint8)


def response(call: Call, outputs: dict[str, np.ndarray]) -> bytes:
    """The body of the response to a call; NaN is the token NaN, as TensorFlow Serving writes it."""
    columns = {name: _listed(name, values) for name, values in outputs.items()}
    if len(columns) == 1:
        result = _list(*columns.values())
    elif call.by_rows:
        rows = zip(*columns.values(), strict=True)
        result = _list(dict(zip(columns, row, strict=True)) for row in rows)
    else:
        lists = (f"{json.dumps(name)}: {_list(values)}" for name, values in columns.items())
        result = f"{{{', '.join(lists)}}}"
    return f'{{"{"predictions" if call.by_rows else "outputs"}": {result}}}'.encode()


def _listed(name: str, values: np.ndarray) -> list:
    if values.dtype != object:
        return [value.tolist() for value in values]
    if name.endswith("_bytes"):
        return [{"b64": base64.b64encode(value).decode()} for value in values.tolist()]
    return [value.decode(errors="replace") for value in values.tolist()]


def _list(values: typing.Iterable) -> str:
    """A JSON list. No call holds Python's lock longer than one of the values takes."""
    return f"[{', '.join(map(json.dumps, values))}]"
