"""A model on a split under all disturbances -> accuracies as JSON and a picture in the run."""

from collections.abc import Callable

import keras
import numpy as np
import tqdm

from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import disturbances, evaluator, plots
from keras_cifar.evaluation.evaluator import DataSource

# Of the images that are disturbed at a time: each byte takes some twenty meanwhile.
DISTURBED_BYTES = 2**22

PICTURED = 16  # images of which the first is drawn and the others give clutter


def disturb_run(run: Run, name: str, source: DataSource, seed: int, max_images: int | None) -> dict:
    """`disturb` of a run's selected model; `source` and errors as `evaluator.evaluate_run`."""
    model, dataset, spec = evaluator.load_run(run, name, source)
    return disturb(model, name, dataset.split(name), spec, run, seed, max_images)


def disturb(
    model: keras.Model,
    name: str,
    split: Split,
    spec: str,
    run: Run,
    seed: int,
    max_images: int | None,
) -> dict:
    """Writes `RUN/eval/<name>_disturbances.json` and `.png`; returns what the JSON holds.

    Args:
        name: of the split: train, val or test.
        spec: the --data that it comes from, for the record.
        seed: of what is random in the disturbances.
        max_images: evaluated, as in `choose`; None is all.

    Returns:
        The accuracy under each disturbance at each strength, without any (`clean_accuracy`) and the
        mean over all disturbances and strengths (`mean_accuracy`). `count` is of the images that were
        looked at, `fingerprint` that of the whole split.
    """
    chosen = choose(split, seed, max_images)
    count = len(chosen)
    size = max(1, DISTURBED_BYTES // int(np.prod(split.image_shape)))
    step = evaluator.compiled(model, split.image_shape)
    right = {key: np.zeros(disturbances.LEVELS) for key in disturbances.DISTURBANCES}
    clean = 0
    total = count * (1 + len(right) * disturbances.LEVELS)
    with tqdm.tqdm(
        total=total, desc="disturbing", unit=" images", leave=False, disable=None
    ) as bar:
        for start in range(0, count, size):
            part = chosen.take(np.arange(start, min(start + size, count)))
            images = part.images
            clean += _count_right(step, images, part.labels)
            bar.update(len(part))
            for key in right:
                for level in range(1, disturbances.LEVELS + 1):
                    disturbed = disturbances.apply(key, images, level, seed, start)
                    right[key][level - 1] += _count_right(step, disturbed, part.labels)
                    bar.update(len(part))
    record = {
        "split": name,
        "data": spec,
        "fingerprint": split.fingerprint,
        "count": count,
        "seed": seed,
        "clean_accuracy": clean / count,
        "mean_accuracy": float(np.mean(list(right.values())) / count),
        "disturbances": {
            key: {
                "strengths": list(row.strengths),
                "unit": row.unit,
                "accuracy": (right[key] / count).tolist(),
            }
            for key, row in disturbances.DISTURBANCES.items()
        },
    }
    write_json(run.disturbances(name), record)
    few = chosen.take(np.arange(min(count, PICTURED))).images
    plots.gallery(disturbances.gallery(few, seed), run.gallery(name))
    return record


def choose(split: Split, seed: int, max_images: int | None) -> Split:
    """So many images at most, evenly spread over a split.

    They are in a random order: splits are often sorted by class, and clutter is to be of all.
    """
    spread = split.spread(max_images or len(split))
    return spread.take(np.random.default_rng(seed).permutation(len(spread)))


def _count_right(step: Callable, images: np.ndarray, labels: np.ndarray) -> int:
    batch = evaluator.BATCH_SIZE
    outputs = [step(images[at : at + batch]).numpy() for at in range(0, len(images), batch)]
    return int((np.concatenate(outputs).argmax(axis=1) == labels).sum())
