"""Temperature scaling of probabilities (Guo et al. 2017, arXiv:1706.04599, section 4.2).

Probabilities become softmax(logits / T), where T minimises the negative log-likelihood on validation
images. The order of the logits stays, so no prediction changes.
"""

import keras
import numpy as np
import scipy.optimize
import scipy.special

from keras_cifar import models
from keras_cifar.core import places
from keras_cifar.core.config import COMPARED
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import evaluator, metrics

RANGE = (0.05, 20.0)  # of T; outside of it, probabilities are nearly one-hot or nearly equal


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Fits the temperature to logits float [N, K] and labels int [N].

    Returns:
        {"temperature", "loss_before", "loss_after", "ece_before", "ece_after", "images"}: the mean
        negative log-likelihood in nats, and the expected calibration error.
    """
    logits = np.asarray(logits, np.float64)

    # The loss is convex in 1 / T, so Brent's method finds its only minimum.
    def loss(log_t: float) -> float:
        scores = scipy.special.log_softmax(logits / np.exp(log_t), axis=1)
        return float(-scores[np.arange(len(labels)), labels].mean())

    found = scipy.optimize.minimize_scalar(
        loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-4}
    )
    temperature = float(np.exp(found.x))

    def error(logits: np.ndarray) -> float:
        probabilities = scipy.special.softmax(logits, axis=1)
        return metrics.calibration_error(probabilities, labels)["expected_calibration_error"]

    return {
        "temperature": temperature,
        "loss_before": loss(0.0),
        "loss_after": loss(found.x),
        "ece_before": error(logits),
        "ece_after": error(logits / temperature),
        "images": len(labels),
    }


def find_temperature(text: str, run: Run) -> dict:
    """Resolves the flag --temperature.

    Args:
        text: a number; `auto`, which fits the run's model on its validation images; or the directory
            of another run with the same flags, whose model and validation images are used instead, so
            that this run may have trained on all images.

    Returns:
        {"temperature"} for a number, otherwise the result of `fit_temperature`.

    Raises:
        UserError: there are no such images, or the other run has other flags (the seed may differ).
    """
    try:
        return {"temperature": float(text)}
    except ValueError:
        other = run if text == "auto" else Run(text)
    config = other.read_config()
    own = run.read_config()
    mine, theirs = own["flags"], config["flags"]
    same = places.same(own["paths"], config["paths"])
    for flag in sorted(COMPARED - same - {"seed", "val_fraction"}):
        if mine[flag] != theirs[flag]:
            raise UserError(
                f"{other.path} was trained with --{flag}={theirs[flag]} and {run.path} with "
                f"{mine[flag]}: their temperatures differ"
            )
    split = evaluator.load_data(config, "val").split("val")
    return fit_to_split(models.load(other.model), split)


def fit_to_split(model: keras.Model, split: Split) -> dict:
    """`fit_temperature` of a model with a layer `logits` on a split."""
    logits = keras.Model(model.inputs[0], model.get_layer("logits").output)
    return fit_temperature(evaluator.predict(logits, split), split.labels)


def scale_logits(model: keras.Model, temperature: float) -> keras.Model:
    """The model with its logits divided by a temperature; it shares the weights."""
    logits = model.get_layer("logits").output
    scaled = keras.layers.Rescaling(1 / temperature, dtype="float32", name="temperature")(logits)
    output = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(scaled)
    return keras.Model(model.inputs[0], output, name=model.name)
