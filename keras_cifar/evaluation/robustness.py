"""The accuracy of a model under all disturbances of a split."""

from collections.abc import Callable

import numpy as np
import tqdm

from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import disturbances, evaluator, plots
from keras_cifar.evaluation.evaluator import BATCH_SIZE, DataSource

DISTURBED_BYTES = 2**22  # of the images that are disturbed at a time; each byte needs some twenty


def disturb(run: Run, name: str, source: DataSource, seed: int, max_images: int | None) -> dict:
    """Evaluates a run's selected model on disturbed images of its split `name`.

    Writes `RUN/eval/<name>_disturbances.json` and `.png`, with the name of other data as
    `evaluator.evaluate`. Errors as `evaluator.load_run`.

    Args:
        seed: of everything random in the disturbances.
        max_images: evaluated, as in `choose`; None is all.

    Returns:
        The contents of the JSON: the accuracy under each disturbance at each strength, without any
        (`clean_accuracy`) and the mean over all disturbances and strengths (`mean_accuracy`). `count`
        is the number of evaluated images, `fingerprint` that of the whole split.
    """
    model, dataset, spec = evaluator.load_run(run, name, source)
    split = dataset.split(name)
    chosen = choose(split, seed, max_images)
    count, levels = len(chosen), range(1, disturbances.LEVELS + 1)
    size = max(1, DISTURBED_BYTES // int(np.prod(split.image_shape)))
    step = evaluator.compiled(model, split.image_shape)
    table = disturbances.DISTURBANCES
    correct, clean = {key: np.zeros(len(levels), int) for key in table}, 0
    with tqdm.tqdm(total=count * len(table), desc="disturbing", leave=False, disable=None) as bar:
        for start in range(0, count, size):
            batch = chosen.take(np.arange(start, min(start + size, count)))
            images, labels = batch.images, batch.labels
            clean += _count_correct(step, images, labels)
            for key in table:
                for level in levels:
                    disturbed = disturbances.apply(key, images, level, seed, start)
                    correct[key][level - 1] += _count_correct(step, disturbed, labels)
                bar.update(len(batch))
    record = {
        "split": name,
        "data": spec,
        "fingerprint": split.fingerprint,
        "count": count,
        "seed": seed,
        "clean_accuracy": clean / count,
        "mean_accuracy": float(np.mean(list(correct.values())) / count),
        "disturbances": {
            key: {
                "strengths": list(row.strengths),
                "unit": row.unit,
                "accuracy": (correct[key] / count).tolist(),
            }
            for key, row in table.items()
        },
    }
    other = run.other_data(record)
    write_json(run.disturbances(name, other), record)
    few = chosen.take(np.arange(min(count, disturbances.NEIGHBOURS))).images
    plots.save(plots.gallery(disturbances.gallery(few, seed)), run.gallery(name, other))
    return record


def choose(split: Split, seed: int, max_images: int | None) -> Split:
    """At most `max_images` images, evenly spread over a split, in a random order.

    The order mixes classes, by which splits are often sorted, so that clutter comes from all of them.
    """
    spread = split.spread(max_images or len(split))
    return spread.take(np.random.default_rng(seed).permutation(len(spread)))


def _count_correct(step: Callable, images: np.ndarray, labels: np.ndarray) -> int:
    batches = (np.s_[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE))
    return sum(int((step(images[b]).numpy().argmax(axis=1) == labels[b]).sum()) for b in batches)
