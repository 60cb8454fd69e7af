"""Figures from predictions. NumPy in, numbers out."""

import numpy as np
import sklearn.metrics

# The smallest positive float32: what a probability that was rounded to zero counts as.
TINY = float(np.finfo(np.float32).tiny)


def summarize(probabilities: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """Loss, accuracy, top-5 accuracy, per-class figures and the confusion matrix.

    Args:
        probabilities: float [N, K].
        labels: int [N], the true classes.

    Returns:
        What `RUN/eval/<split>.json` holds beside the split's name. The loss is the mean
        cross-entropy in nats. `confusion` has a row for each true class. Precision, recall and F1
        are 0 where they are undefined.
    """
    classes = range(len(class_names))
    predicted = probabilities.argmax(axis=1)
    true = probabilities[np.arange(len(labels)), labels]
    better = (probabilities > true[:, None]).sum(axis=1)
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return {
        "count": len(labels),
        "loss": float(-np.log(np.maximum(true.astype(np.float64), TINY)).mean()),
        "accuracy": float((predicted == labels).mean()),
        "top5_accuracy": float((better < 5).mean()),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "count": int(support[i]),
            }
            for i, name in enumerate(class_names)
        },
        "confusion": sklearn.metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def table(summary: dict) -> str:
    """The per-class figures as text."""
    width = max(5, *(len(name) for name in summary["per_class"]))
    lines = [f"{'class':{width}}  precision  recall      f1   count"]
    for name, row in summary["per_class"].items():
        lines.append(
            f"{name:{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}"
            f"  {row['count']:6}"
        )
    return "\n".join(lines)
