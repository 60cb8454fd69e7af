"""Temperature scaling: one number that makes probabilities mean what they say.

Guo et al. 2017, arXiv:1706.04599, section 4.2: softmax(logits / T), with the T that minimises the
negative log-likelihood of validation. No label changes, as the order of the logits does not.
"""

import keras
import numpy as np
import scipy.optimize
import scipy.special

from keras_cifar import models
from keras_cifar.core.config import COMPARED
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import evaluator, metrics

# T is searched for in this range: outside of it, probabilities are all but one-hot or all but equal.
RANGE = (0.05, 20.0)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> dict:
    """The temperature that fits best.

    Args:
        logits: float [N, K].
        labels: int [N].

    Returns:
        {"temperature", "loss_before", "loss_after", "ece_before", "ece_after", "images"}: the mean
        negative log-likelihood in nats, and the expected calibration error.
    """
    logits = np.asarray(logits, np.float64)

    # Convex in 1 / T, so it has one minimum, and Brent's method in the bounds finds it.
    def loss(log_t: float) -> float:
        scores = scipy.special.log_softmax(logits / np.exp(log_t), axis=1)
        return float(-scores[np.arange(len(labels)), labels].mean())

    found = scipy.optimize.minimize_scalar(
        loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-4}
    )
    temperature = float(np.exp(found.x))

    def error(logits: np.ndarray) -> float:
        found = metrics.calibration_error(scipy.special.softmax(logits, 1), labels)
        return found["expected_calibration_error"]

    return {
        "temperature": temperature,
        "loss_before": loss(0.0),
        "loss_after": loss(found.x),
        "ece_before": error(logits),
        "ece_after": error(logits / temperature),
        "images": len(labels),
    }


def find_temperature(text: str, run: Run) -> dict:
    """What --temperature stands for.

    Args:
        text: a number; `auto`, for what fits the run's validation images; or the directory of another
            run, for what fits that one's model on its own, so that the run may have trained on all.

    Returns:
        {"temperature"} for a number, otherwise as `fit_temperature`.

    Raises:
        UserError: there are no such images, or the other run has other flags (any seed will do).
    """
    try:
        return {"temperature": float(text)}
    except ValueError:
        other = run if text == "auto" else Run(text)
    config = other.read_config()
    mine, theirs = run.read_config()["flags"], config["flags"]
    for flag in sorted(COMPARED - {"seed", "val_fraction"}):
        if mine[flag] != theirs[flag]:
            raise UserError(
                f"{other.path} was trained with --{flag}={theirs[flag]} and {run.path} with "
                f"{mine[flag]}: its temperature would be another"
            )
    split = evaluator.load_data(config, "val").split("val")
    return fit_to_split(models.load(other.model), split)


def fit_to_split(model: keras.Model, split: Split) -> dict:
    """`fit_temperature` of a model with a layer called `logits`, on the images of a split."""
    logits = keras.Model(model.inputs[0], model.get_layer("logits").output)
    return fit_temperature(evaluator.predict(logits, split), split.labels)


def scale_logits(model: keras.Model, temperature: float) -> keras.Model:
    """The model with its logits divided by a temperature, on the same weights."""
    logits = model.get_layer("logits").output
    cooled = keras.layers.Rescaling(1 / temperature, dtype="float32", name="temperature")(logits)
    output = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(cooled)
    return keras.Model(model.inputs[0], output, name=model.name)
