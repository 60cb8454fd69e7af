"""Proposes the probability below which `predict --min_probability` answers `unknown`.

The largest probability ranks the answers, wrong ones tend to come last (Hendrycks and Gimpel 2017,
arXiv:1610.02136); a threshold on it trades coverage for accuracy (Geifman and El-Yaniv 2017,
arXiv:1705.08500). The threshold here is the empirical one, without the latter's guarantee.
"""

import json

import numpy as np

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.run_directory import Run
from keras_cifar.exporters import verification
from keras_cifar.inference import predictor

ONE_WRONG_IN = 20  # answers, at most: an accuracy of 0.95
MIN_ANSWERED = 20  # images; fewer cannot show such an accuracy
MAX_RECORD = 2**20  # bytes of verification.json, which has about 1,000


def propose(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """The smallest threshold at which enough of the remaining answers are right.

    Takes probabilities float32 [N, K] and labels int [N], of validation images. An image is answered
    if its largest probability is not below the threshold. Enough are 0.95 of the answers, and at most
    half the error of all images: where the accuracy is above 0.9, the target is halfway from it to 1.

    Returns:
        {"value", "accuracy", "answered", "target"}: the threshold, the accuracy of the answers, the
        share of images that are answered, and the accuracy that was asked for. The first three are
        None if no threshold reaches it; the value is 0 if all answers are right.
    """
    right = probabilities.argmax(axis=1) == labels
    steps, places = np.unique(probabilities.max(axis=1), return_inverse=True)
    # Of the images at a step or above; the first entries are those of all images.
    answered, wrong = (
        np.bincount(places, kind)[::-1].cumsum()[::-1].astype(np.int64)
        for kind in (np.ones(len(labels)), ~right)
    )
    images, errors = len(labels), wrong[0]
    enough = (ONE_WRONG_IN * wrong <= answered) & (2 * images * wrong <= errors * answered)
    found = np.flatnonzero(enough & (answered >= MIN_ANSWERED))
    target = 1 - min(1 / ONE_WRONG_IN, float(errors) / (2 * images))
    if not len(found):
        return {"value": None, "accuracy": None, "answered": None, "target": target}
    first = found[0]
    return {
        "value": _shortest(float(steps[first - 1]), float(steps[first])) if first else 0.0,
        "accuracy": float(1 - wrong[first] / answered[first]),
        "answered": float(answered[first] / images),
        "target": target,
    }


def _shortest(low: float, high: float) -> float:
    """The decimal with the fewest digits above `low`, at most `high` and below 1, near their middle.

    All such thresholds separate the same images. Some decimal does if both are from float32.
    """
    decimals = (float(f"{(low + high) / 2:.{digits}f}") for digits in range(1, 18))
    return next(value for value in decimals if low < value <= high and value < 1)


def propose_for_export(run: Run, probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """`propose` for what `predict --model RUN` shows, from the probabilities of the run's model.

    The export may divide the logits by a temperature, which the result has as "temperature".
    """
    temperature = _exported_temperature(run)
    if temperature != 1:
        scaled = probabilities.astype(np.float64) ** (1 / temperature)
        probabilities = (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32)
    return propose(probabilities, labels) | {"temperature": temperature}


def _exported_temperature(run: Run) -> float:
    """The temperature in the export that `predict --model RUN` loads; 1 where there is none."""
    try:
        path = predictor.find(str(run.path)) / verification.FILE
    except UserError:
        return 1.0
    if not path.exists():
        return 1.0
    try:
        stored = json.loads(read(path, MAX_RECORD))
        return float(stored.get("calibration", {"temperature": 1})["temperature"])
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{path} is damaged: {reason(error)}") from None
