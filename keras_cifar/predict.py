"""Classifies pictures with an exported model; needs nothing but the SavedModel, or its server.

python -m keras_cifar.predict --model RUN_or_EXPORT dog.png holiday/ 'more/*.jpg'
python -m keras_cifar.predict --model http://HOST:PORT/v1/models/NAME dog.png
python -m keras_cifar.predict --model pretrained:NAME dog.png
"""

import collections
import concurrent.futures
import csv
import dataclasses
import glob
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from keras_cifar import pretrained
from keras_cifar.core import cli, environment
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UserError, one_line, reason
from keras_cifar.core.files import replacing, to_json
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import Run

AHEAD = 1  # batches that are decoded while one is classified
THREADS = min(32, os.cpu_count() or 1)  # that decode
URLS = ("http://", "https://")
OVERLAY_SIDE = 224  # pixels that the sides of an overlay have at least


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """The command's flags."""

    model: str = option(
        "", "a run, an export or a version of it, its URL, or pretrained:NAME", "Prediction"
    )
    list_pretrained: bool = option(
        False, "print what is known of each model that comes with the package and end", "Prediction"
    )
    top_k: int = option(3, "classes to name for each picture", "Prediction")
    format: str = option("text", "of what goes to stdout", "Prediction", ("text", "csv", "json"))
    features: str | None = option(
        None,
        "also write the feature vectors to this .npz file (files, features, labels)",
        "Prediction",
    )
    explain: str | None = option(
        None,
        "also write into this folder, for each picture, where the model sees its class (Grad-CAM); "
        "needs a run",
        "Prediction",
    )
    timeout: float = option(60.0, "seconds that a server has for a batch", "With a URL")
    labels: str | None = option(
        None, "a file with a class name a line, for servers that do not tell them", "With a URL"
    )

    def __post_init__(self):
        check(
            self.model or self.list_pretrained,
            "--model=RUN_or_EXPORT_or_URL is needed",
        )
        check(self.top_k > 0, f"--top_k={self.top_k} must be greater than 0")
        check(0 < self.timeout < math.inf, f"--timeout={self.timeout} must be greater than 0")
        check(
            self.explain is None or not self.model.startswith(URLS),
            "--explain needs a run with its model.keras; a server gives no gradients",
        )


def main(options: PredictOptions, arguments: list[str]) -> int:
    """Runs the command; returns 1 where a file could not be classified."""
    if options.list_pretrained:
        print(pretrained.describe())
        return 0
    check(arguments, "name at least one picture, folder or glob")
    import tqdm

    environment.import_tensorflow()
    predictor = _predictor(options)
    explain = _explainer(options, predictor) if options.explain else None
    rows, features = [], []
    with tqdm.tqdm(desc="classifying", unit=" files", leave=False, disable=None) as progress:
        for batch in _batches(find_files(arguments), predictor.size):
            batch_rows, batch_features = _classify(predictor, batch, options)
            if explain:
                explain(batch, batch_rows, len(rows) + 1)
            rows += batch_rows
            features += batch_features
            progress.update(len(batch))
    _WRITERS[options.format](rows)
    if options.features:
        _write_features(options.features, rows, features)
        print(f"features  {options.features}", file=sys.stderr)
    if options.explain:
        print(f"overlays  {options.explain}", file=sys.stderr)
    failed = [row for row in rows if row["error"]]
    if failed:
        line = (
            f"predict: {len(failed)} of {len(rows)} files could not be classified, the first: "
            f"{failed[0]['file']}: {failed[0]['error']}"
        )
        print(one_line(line), file=sys.stderr)
    return 1 if failed else 0


def _predictor(options: PredictOptions):
    """What classifies: a Predictor or a RemotePredictor."""
    if options.model.startswith(pretrained.PREFIX):
        from keras_cifar.pretrained.predictor import PretrainedPredictor

        return PretrainedPredictor(options.model.removeprefix(pretrained.PREFIX))
    if options.model.startswith(URLS):
        from keras_cifar.inference.remote import RemotePredictor

        return RemotePredictor(options.model, options.timeout, options.labels)
    from keras_cifar.inference.predictor import Predictor

    return Predictor(options.model)


def _explainer(options: PredictOptions, predictor) -> Callable[[list, list[dict], int], None]:
    """What writes the overlays of a batch: of (the batch, its rows, the number of the first).

    Raises:
        UserError: --model is no run with a model.keras, or that is of other images or classes.
    """
    from keras_cifar import models
    from keras_cifar.evaluation import grad_cam

    if options.model.startswith(pretrained.PREFIX):
        model, _ = pretrained.load(options.model.removeprefix(pretrained.PREFIX))
    else:
        path = Run(options.model).model
        if not path.exists():
            raise UserError(
                f"--explain needs a run with its model.keras, and --model={options.model} is none; "
                "an export gives no gradients"
            )
        model = models.load(path)
        shapes = (model.input_shape[1:3], model.output_shape[1])
        if shapes != (tuple(predictor.size), len(predictor.class_names)):
            raise UserError(f"{path} and {predictor.path} are of different images or classes")
    grad_cam = grad_cam.GradCam(model)
    folder = pathlib.Path(options.explain).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def explain(batch: list, rows: list[dict], first: int) -> None:
        import numpy as np
        from PIL import Image

        good = [i for i, (_, _, error) in enumerate(batch) if error is None]
        if not good:
            return
        images = np.stack([batch[i][1] for i in good])
        heat = grad_cam.heat(images, np.array([rows[i]["top"][0]["index"] for i in good]))
        overlays = grad_cam.enlarge(grad_cam.overlay(images, heat), OVERLAY_SIDE)
        for i, pixels in zip(good, overlays, strict=True):
            name = grad_cam.file_name(first + i, batch[i][0])
            with replacing(folder / name) as temporary:
                Image.fromarray(pixels).save(temporary)

    return explain


# ---- Files in


def find_files(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """(file, None) for each picture, or (argument, reason) where there is none.

    A folder stands for the pictures in it and below it, sorted; a glob for what it matches; a file
    is taken whatever it is called.
    """
    for argument in arguments:
        path = pathlib.Path(argument)
        matches = [argument]
        if not os.path.lexists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                yield argument, "nothing matches this pattern"
        for match in matches:
            path = pathlib.Path(match)
            try:
                if not path.is_dir():
                    yield match, None if path.exists() else "no such file"
                    continue
            except OSError as error:
                yield match, reason(error)
                continue
            found = _pictures(match)
            if not found:
                yield match, "the folder has no pictures"
            yield from found


def _pictures(folder: str) -> list[tuple[str, str | None]]:
    """(file, None) of each picture below a folder, and (folder, reason) of those that are locked."""
    from keras_cifar.data.images import SUFFIXES

    found = []

    def locked(error: OSError) -> None:
        found.append((error.filename, reason(error)))

    for directory, folders, names in os.walk(folder, onerror=locked):  # which follows no links
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (os.path.join(directory, name), None)
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(found, key=lambda item: item[0].split(os.sep))


def _batches(
    files: Iterator[tuple[str, str | None]], size: tuple[int, int]
) -> Iterator[list[tuple]]:
    """Lists of (file, pixels or None, reason or None), in order.

    While the caller works on one list the next AHEAD are decoded, and no more: a folder of any size
    takes the same memory.
    """
    started = collections.deque()  # of (what is left to read, what was read, who reads)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            while True:
                while len(started) <= AHEAD and (
                    batch := list(itertools.islice(files, BATCH_SIZE))
                ):
                    left, done = collections.deque(enumerate(batch)), [None] * len(batch)
                    # A task a thread, not a file: a task costs as much as decoding a small picture.
                    tasks = [pool.submit(_read, left, done, size) for _ in range(THREADS)]
                    started.append((left, done, tasks))
                if not started:
                    return
                _, done, tasks = started.popleft()
                for task in tasks:
                    task.result()
                yield done
        finally:
            for left, _, _ in started:
                left.clear()  # so that an interrupt does not wait for pictures nobody wants


def _read(left: collections.deque, done: list, size: tuple[int, int]) -> None:
    """Moves the items of `left`, (position, (file, reason or None)), to `done`, pictures decoded.

    Several threads do so at once; each takes what comes next.
    """
    from keras_cifar.data.images import ImageError, load_image

    while left:
        try:
            position, (file, error) = left.popleft()
        except IndexError:  # Another thread was faster.
            return
        pixels = None
        if error is None:
            try:
                pixels = load_image(file, size)
            except ImageError as problem:
                error = str(problem)
        done[position] = (file, pixels, error)


# ---- Classes out


def _classify(predictor, batch: list, options: PredictOptions) -> tuple[list[dict], list]:
    """(an object a file as --format=json prints it, the feature vectors of the good ones)."""
    import numpy as np

    good = [pixels for _, pixels, error in batch if error is None]
    top, features = [], []
    if good:
        images = np.stack(good)
        probabilities = predictor.classify(images)
        # Stable, so that equal probabilities are named in the order of the classes.
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : options.top_k]
        top = [
            [
                {"label": predictor.class_names[i], "index": int(i), "probability": float(row[i])}
                for i in best
            ]
            for row, best in zip(probabilities, order, strict=True)
        ]
        features = list(predictor.features(images)) if options.features else []
    answers = iter(top)
    rows = [
        {"file": file, "top": [] if error else next(answers), "error": error}
        for file, _, error in batch
    ]
    return rows, features


def _write_text(rows: list[dict]) -> None:
    for row in rows:
        words = ", ".join(f"{c['label']} {c['probability']:.1%}" for c in row["top"])
        print(one_line(f"{row['file']}: {words or 'error: ' + row['error']}"))


def _write_json(rows: list[dict]) -> None:
    print(to_json(rows))


def _write_csv(rows: list[dict]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "rank", "label", "index", "probability", "error"])
    for row in rows:
        for rank, c in enumerate(row["top"], start=1):
            writer.writerow([row["file"], rank, c["label"], c["index"], c["probability"], ""])
        if row["error"]:
            writer.writerow([row["file"], "", "", "", "", row["error"]])


_WRITERS = {"text": _write_text, "json": _write_json, "csv": _write_csv}


def _write_features(path: str, rows: list[dict], features: list) -> None:
    """An .npz file: files string [N], features float32 [N, D], labels string [N]."""
    import numpy as np

    good = [row for row in rows if not row["error"]]
    with replacing(pathlib.Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            files=np.array([row["file"] for row in good], np.str_),
            features=np.array(features, np.float32).reshape(len(good), -1 if good else 0),
            labels=np.array([row["top"][0]["label"] for row in good], np.str_),
        )


if __name__ == "__main__":
    # Importing TensorFlow imports Keras too, which takes a third of the time and is of no use here;
    # not so where TensorFlow is told to use an older Keras, which is rarely installed.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    cli.run("predict", main, PredictOptions, __doc__, "IMAGE|FOLDER|GLOB ...", tensorflow=False)
