"""Metrics of predictions: NumPy in, numbers out."""

import numpy as np
import sklearn.metrics

# The smallest positive float32: what a probability that was rounded to zero counts as.
TINY = float(np.finfo(np.float32).tiny)

# Intervals: of the middle 95 % of what so many resamples of the images give, always the same ones.
LEVEL = 0.95
RESAMPLES = 1000
RESAMPLED = 2**20  # images of resamples in memory at a time

BINS = 15  # of confidence, as in Guo et al. 2017, arXiv:1706.04599
MAX_CONFUSED = 20  # pairs of classes
MAX_MISTAKES = 48  # images


def summarize(probabilities: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """Loss, accuracy and top-5 accuracy with intervals, metrics of each class, confusion, calibration.

    Args:
        probabilities: float [N, K].
        labels: int [N], the true classes.

    Returns:
        What `RUN/eval/<split>.json` holds beside the split's name. `loss` is the mean cross-entropy in
        nats. `confusion` has a row for each true class. Undefined precision, recall and F1 are 0.
        `intervals` are those of `bootstrap`, `calibration` is the result of `calibration_error`.
        `confused` lists the most confused pairs of classes, most images first; `mistakes` lists the
        wrong predictions, most confident first. Equal entries keep their order.
    """
    classes = range(len(class_names))
    predicted = probabilities.argmax(axis=1)
    true = probabilities[np.arange(len(labels)), labels]
    better = (probabilities > true[:, None]).sum(axis=1)
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
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
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "count": int(support[i]),
            }
            for i, name in enumerate(class_names)
        },
        "confusion": matrix.tolist(),
        "confused": _confused(matrix, class_names),
        "mistakes": _mistakes(probabilities, labels, class_names),
    }


def bootstrap(values: np.ndarray) -> list[float]:
    """[low, high] of a mean: percentiles of the means of resamples of the images.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. It says how much the
    figure would change with other test images of the same kind. Where all values are equal, so are
    those of every resample: of 20 right answers out of 20 the interval is [1, 1].

    Args:
        values: float or bool [N], one an image; bool are resampled by their counts alone.
    """
    random, count = np.random.default_rng(0), len(values)
    if values.dtype == bool:
        means = random.binomial(count, values.mean(), RESAMPLES) / count
    else:
        rows = max(1, RESAMPLED // count)
        sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
        drawn = (random.integers(0, count, (size, count), np.int32) for size in sizes)
        means = np.concatenate([values[chosen].mean(axis=1) for chosen in drawn])
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """How far the largest probability is from the accuracy: Guo et al. 2017, section 2.

    Args:
        probabilities: float [N, K].
        labels: int [N].

    Returns:
        {"expected_calibration_error": the mean over images of their bin's distance, "bins": [{"low",
        "high", "count", "confidence", "accuracy"}, ...]}: a bin has the images whose largest
        probability is above low and at most high, and the means of these; None where there are none.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.arange(BINS + 1) / BINS
    places = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(places, minlength=BINS)
    confident, correct = (np.bincount(places, x, BINS) for x in (confidence, right))
    return {
        # Of each bin, the size times the difference of the means is the difference of the sums.
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
    true, predicted = np.nonzero(wrong)
    order = np.argsort(-wrong[true, predicted], kind="stable")[:MAX_CONFUSED]
    return [
        {
            "true": class_names[true[i]],
            "predicted": class_names[predicted[i]],
            "count": int(wrong[true[i], predicted[i]]),
        }
        for i in order
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
