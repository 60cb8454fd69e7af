"""Metrics of predictions: NumPy in, numbers out."""

import numpy as np
import sklearn.metrics

TINY = float(np.finfo(np.float32).tiny)  # replaces a probability that was rounded to zero

LEVEL = 0.95  # of the intervals
RESAMPLES = 1000

PER_CLASS = ("precision", "recall", "f1", "count")

BINS = 15  # of confidence, as in Guo et al. 2017, arXiv:1706.04599
MAX_CONFUSED = 20  # pairs of classes
MAX_MISTAKES = 48  # images


def summarize(probabilities: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """The metrics of probabilities float [N, K], of images with labels int [N].

    They are what `RUN/eval/<split>.json` holds beside the split's name and data. `loss` is the mean
    cross-entropy in nats. `confusion` has a row for each true class. Undefined precision, recall and F1
    are 0. `intervals` are those of `bootstrap`, `calibration` is the result of `calibration_error`.
    `confused` lists the most confused pairs of classes, most images first; `mistakes` the wrong
    predictions, most confident first. Equal entries keep their order.
    """
    classes = range(len(class_names))
    predicted = probabilities.argmax(axis=1)
    true = probabilities[np.arange(len(labels)), labels]
    better = (probabilities > true[:, None]).sum(axis=1)
    per_class = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    losses = -np.log(np.maximum(true.astype(np.float64), TINY))
    right, among_five = predicted == labels, better < 5
    matrix = sklearn.metrics.confusion_matrix(labels, predicted, labels=classes)
    return {
        "count": len(labels),
        "loss": float(losses.mean()),
        "accuracy": float(right.mean()),
        "top5_accuracy": float(among_five.mean()),
        "intervals": {
            "level": LEVEL,
            "accuracy": bootstrap(right),
            "top5_accuracy": bootstrap(among_five),
            "loss": bootstrap(losses),
        },
        "calibration": calibration_error(probabilities, labels),
        "per_class": {
            name: dict(zip(PER_CLASS, row, strict=True))
            for name, *row in zip(class_names, *(x.tolist() for x in per_class), strict=True)
        },
        "confusion": matrix.tolist(),
        "confused": _confused(matrix, class_names),
        "mistakes": _mistakes(probabilities, labels, class_names),
    }


def bootstrap(values: np.ndarray) -> list[float]:
    """The interval [low, high] of a mean: percentiles of the means of resamples of the images.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. It estimates how much the
    metric would change with other test images of the same kind. Equal values have no spread: 20 right
    predictions out of 20 give [1, 1]. `values` are float or bool [N], one an image.
    """
    random, count = np.random.default_rng(0), len(values)
    if values.dtype == bool:
        means = random.binomial(count, values.mean(), RESAMPLES) / count
    else:
        drawn = (random.integers(0, count, count, np.int32) for _ in range(RESAMPLES))
        means = [values[rows].mean() for rows in drawn]
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """The expected calibration error, and the bins of a reliability diagram (Guo et al., section 2).

    Takes probabilities float [N, K] and labels int [N]. A bin has the images whose largest probability
    is above low and at most high; its confidence and accuracy are means over them, or None without
    images. The error is the mean over all images of the distance between the two.

    Returns:
        {"expected_calibration_error", "bins": [{"low", "high", "count", "confidence", "accuracy"}]}
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.arange(BINS + 1) / BINS
    places = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(places, minlength=BINS)
    confident, correct = (np.bincount(places, x, BINS) for x in (confidence, right))
    return {
        # The size of a bin times the difference of its means is the difference of its sums.
        "expected_calibration_error": float(np.abs(confident - correct).sum() / len(labels)),
        "bins": [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": int(counts[i]),
                "confidence": float(confident[i] / counts[i]) if counts[i] else None,
                "accuracy": float(correct[i] / counts[i]) if counts[i] else None,
            }
            for i in range(BINS)
        ],
    }


def _confused(matrix: np.ndarray, class_names: tuple[str, ...]) -> list[dict]:
    wrong = matrix - np.diag(np.diag(matrix))
    pairs = np.argwhere(wrong)
    order = np.argsort(-wrong[tuple(pairs.T)], kind="stable")[:MAX_CONFUSED]
    return [
        {"true": class_names[i], "predicted": class_names[j], "count": int(wrong[i, j])}
        for i, j in pairs[order]
    ]


def _mistakes(probabilities: np.ndarray, labels: np.ndarray, class_names: tuple) -> list[dict]:
    predicted = probabilities.argmax(axis=1)
    rows = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[rows, predicted[rows]], kind="stable")[:MAX_MISTAKES]
    return [
        {
            "row": int(row),
            "true": class_names[labels[row]],
            "predicted": class_names[predicted[row]],
            "probability": float(probabilities[row, predicted[row]]),
            "true_probability": float(probabilities[row, labels[row]]),
        }
        for row in rows[order]
    ]
