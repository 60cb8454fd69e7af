"""JSON schemas of TensorFlow Serving's REST API, written from its documentation.

https://www.tensorflow.org/tfx/serving/api_rest and the protocol buffers that it names
(get_model_status.proto, get_model_metadata.proto); for signatures whose inputs and outputs are ours.
"""

import jsonschema


def _object(required: dict, optional: dict | None = None) -> dict:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _map(values: dict) -> dict:
    return {"type": "object", "additionalProperties": values}


def _list(items: dict, **more) -> dict:
    return {"type": "array", "items": items, "minItems": 1} | more


_BYTE = {"type": "integer", "minimum": 0, "maximum": 255}
_PIXELS = _list(_list(_list(_BYTE, minItems=3, maxItems=3)))  # of an image
_BASE64 = _object({"b64": {"type": "string", "pattern": "^[A-Za-z0-9+/]*={0,2}$"}})
_INPUTS = [("images", _PIXELS), ("image_bytes", _BASE64)]
_SIGNATURE = {"signature_name": {"type": "string"}}

# "If the output of the model contains only one named tensor, we omit the name".
_ROW = {
    "probabilities": _list({"type": "number"}),
    "label": {"type": "string"},
    "label_index": {"type": "integer"},
}
_FEATURES = _list({"type": "number"})

ERROR = _object({"error": {"type": "string", "minLength": 1}})

# One named input may go without its name, in both formats.
ROW_REQUEST = {
    "anyOf": [
        _object({"instances": _list(each)}, _SIGNATURE)
        for name, value in _INPUTS
        for each in (value, _object({name: value}))
    ]
}
COLUMN_REQUEST = {
    "anyOf": [
        _object({"inputs": each}, _SIGNATURE)
        for name, value in _INPUTS
        for each in (_list(value), _object({name: _list(value)}))
    ]
}
ROW_RESPONSE = _object({"predictions": {"anyOf": [_list(_object(_ROW)), _list(_FEATURES)]}})
_COLUMNS = _object({name: _list(value) for name, value in _ROW.items()})
COLUMN_RESPONSE = _object({"outputs": {"anyOf": [_COLUMNS, _list(_FEATURES)]}})

_STATES = ["UNKNOWN", "START", "LOADING", "AVAILABLE", "UNLOADING", "END"]
_INT64 = {"type": "string", "pattern": "^-?[0-9]+$"}  # as proto3's JSON writes it
STATUS = _object(
    {
        "model_version_status": _list(
            _object(
                {
                    "version": _INT64,
                    "state": {"enum": _STATES},
                    "status": _object(
                        {"error_code": {"type": "string"}, "error_message": {"type": "string"}}
                    ),
                }
            )
        )
    }
)

_TENSOR = _object(
    {
        "dtype": {"type": "string", "pattern": "^DT_[A-Z0-9]+$"},
        "tensor_shape": _object(
            {
                "dim": {"type": "array", "items": _object({"size": _INT64, "name": {"const": ""}})},
                "unknown_rank": {"type": "boolean"},
            }
        ),
        "name": {"type": "string"},
    }
)
_TENSORS = _map(_TENSOR)
_METHOD = {"method_name": {"type": "string"}}
_SIGNATURE_DEF = _object(
    {"inputs": _TENSORS, "outputs": _TENSORS} | _METHOD, {"defaults": {"type": "object"}}
)
METADATA = _object(
    {
        "model_spec": _object(
            {"name": {"type": "string"}, "signature_name": {"const": ""}, "version": _INT64}
        ),
        "metadata": {
            "type": "object",  # a map; clients skip what they do not know
            "required": ["signature_def"],
            "properties": {"signature_def": _object({"signature_def": _map(_SIGNATURE_DEF)})},
        },
    }
)


def check(value: object, schema: dict) -> None:
    """Raises jsonschema.ValidationError where `value` is not as the documentation says."""
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
