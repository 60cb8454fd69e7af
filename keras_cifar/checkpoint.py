"""The state of a run after an epoch, in one file that is replaced as a whole."""

import json
import pathlib

import numpy as np

from keras_cifar.classifier import Classifier
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


def restore(path: pathlib.Path, model: Classifier) -> dict:
    """Assigns what `save` wrote and returns its `state`; {} where there is no checkpoint.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    if not path.exists():
        return {}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
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
