"""The results of an evaluation as text: tables, and the lines below them."""

import numpy as np

from keras_cifar.evaluation.selective import MIN_ANSWERED

SHOWN = 3  # of the most confused pairs, in a summary


def metrics_summary(metrics: dict) -> str:
    """The metrics of a whole split, as `metrics.summarize` gives them."""

    def value(name: str) -> str:
        low, high = metrics["intervals"][name]
        return f"{metrics[name]:.4f} ({low:.4f} to {high:.4f})"

    pairs = (f"{c['true']} as {c['predicted']} {c['count']:,}" for c in metrics["confused"][:SHOWN])
    return (
        f"accuracy {value('accuracy')}, top-5 {value('top5_accuracy')}, loss {value('loss')} on "
        f"{metrics['count']:,} images, in brackets {metrics['intervals']['level']:.0%} intervals\n"
        f"calibration error {metrics['calibration']['expected_calibration_error']:.4f}; "
        f"most confused: {', '.join(pairs) or 'none'}"
    )


def metrics_table(metrics: dict) -> str:
    """The metrics of each class: a line a class."""
    rows = [("class", "precision", "recall", "f1", "count")]
    for name, row in metrics["per_class"].items():
        values = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        rows.append((name, *values, str(row["count"])))
    return aligned(rows, left=1)


def disturbance_summary(record: dict) -> str:
    """The accuracy under all disturbances together, as `robustness.disturb` gives it."""
    return (
        f"accuracy {record['clean_accuracy']:.4f} without disturbances, {record['mean_accuracy']:.4f} "
        f"averaged over disturbances and strengths, on {record['count']:,} images"
    )


def disturbance_table(record: dict) -> str:
    """The accuracy under each disturbance: a line a disturbance, a column a strength."""
    disturbances = record["disturbances"]
    levels = max(len(row["accuracy"]) for row in disturbances.values())
    rows = [("disturbance", *map(str, range(1, levels + 1)), "mean", "strengths")]
    for name, row in disturbances.items():
        accuracies = (f"{value:.4f}" for value in [*row["accuracy"], np.mean(row["accuracy"])])
        strengths = ", ".join(f"{value:g}" for value in row["strengths"])
        rows.append((name, *accuracies, f"{strengths} {row['unit']}"))
    widest = max(len(row[-1]) for row in rows)
    return aligned([(*row[:-1], row[-1].ljust(widest)) for row in rows], left=1)


def temperature_summary(fitted: dict) -> str:
    """A temperature and what it changes, as `temperature.fit_temperature` gives them."""
    return (
        f"temperature {fitted['temperature']:.3f}, fitted to {fitted['images']:,} validation images: "
        f"loss {fitted['loss_before']:.4f} -> {fitted['loss_after']:.4f}, "
        f"calibration error {fitted['ece_before']:.4f} -> {fitted['ece_after']:.4f}"
    )


def threshold_summary(proposed: dict) -> str:
    """What a threshold does, as `selective.propose` gives it."""
    value = proposed["value"]
    if value is None:
        return (
            f"no --min_probability is proposed: none answers at least {MIN_ANSWERED} of these images "
            f"with {proposed['target']:.1%} of the answers right"
        )
    if value == 0:
        return "no --min_probability is needed: all answers are right"
    return (
        f"predict --min_probability {value} answers {proposed['answered']:.1%} of the images, and "
        f"{proposed['accuracy']:.1%} of these answers are right"
    )


def aligned(rows: list[tuple[str, ...]], left: int) -> str:
    """A table as text: the first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = "<" * left + ">" * (len(widths) - left)
    layout = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    return "\n".join(layout.format(*row).rstrip() for row in rows)
