"""The state of a run after an epoch, in one file that is replaced as a whole."""

import hashlib
import io
import json
import pathlib

import numpy as np

from keras_cifar.classifier import Classifier
from keras_cifar.distribution import Devices
from keras_cifar.errors import UserError, reason
from keras_cifar.run import replacing


def _variables(model: Classifier) -> list:
    """Everything that decides the next step: weights, random states, optimizer, averages."""
    # `variables` has the seeds of dropout, which no Keras file format keeps.
    return [*model.variables, *model.optimizer.variables, *model.averages]


def save(path: pathlib.Path, model: Classifier, state: dict) -> None:
    """Writes the model's and the optimizer's variables, and `state`, which must be JSON."""
    arrays = {f"variable_{i}": v.numpy() for i, v in enumerate(_variables(model))}
    with replacing(path) as temporary:
        np.savez(temporary, state=np.array(json.dumps(state)), **arrays)


def digest(model: Classifier) -> str:
    """A hash of everything that `save` writes of a model: equal for equal bits only."""
    found = hashlib.sha256()
    for variable in _variables(model):
        found.update(np.ascontiguousarray(variable.numpy()))
    return found.hexdigest()[:16]


def restore(path: pathlib.Path, model: Classifier, devices: Devices) -> dict:
    """Assigns what `save` wrote and returns its `state`; {} where there is no checkpoint.

    The chief reads the file; the other workers need not see it.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    data = path.read_bytes() if devices.is_chief and path.exists() else b""
    data = devices.broadcast(data)
    if not data:
        return {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            state = json.loads(str(arrays["state"]))
            values = [arrays[f"variable_{i}"] for i in range(len(arrays.files) - 1)]
    except Exception as error:  # A damaged zip file can raise many things.
        raise UserError(f"checkpoint {path} is damaged: {reason(error)}") from None
    variables = _variables(model)
    if [v.shape for v in values] != [tuple(v.shape) for v in variables]:
        raise UserError(f"checkpoint {path} is of another network or optimizer")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return state
