"""Image-classification data sets of TensorFlow Datasets, by name."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import sys
import urllib.parse

import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.image_size import STRETCH
from keras_cifar.data.cache import Cache, in_block
from keras_cifar.data.images import decode_image, resize_images
from keras_cifar.data.splits import BadImages, Split, Splits, hold_out
from keras_cifar.distributed.sharding import without_autotune

CONNECT_TIMEOUT = 10  # seconds; TFDS itself tries again for more than 3 minutes
ENDS = 2**16  # bytes at the beginning and at the end of a file
MAX_FEATURES = 2**24  # bytes of features.json, which has a few hundred
PEEK = 16  # examples of the test split whose labels are looked at before anything is decoded
WITHHELD = "its test labels are withheld"
TEST_FRACTION = 0.1  # held out of train where a data set has neither test nor validation

OTHER_WAYS = (
    "use --data=archive:PATH with the official cifar-10-python.tar.gz, --data=folder:PATH with "
    "PATH/train/<class>/* and PATH/test/<class>/*, or --data=digits, which is built in"
)


def load(
    argument: str,
    data_dir: str | None,
    size: tuple[int, int] | None,
    rule: str,
    cache: Cache,
    bad_images: BadImages,
) -> Splits:
    """Reads a TFDS data set, and downloads and prepares it if `data_dir` lacks it."""
    if bad_images.skip:
        # A bad record means that the preparation of the data set went wrong.
        raise UsageError("--on_bad_image=skip is for --data=folder:PATH, not for TFDS data sets")
    name, builder = argument, _builder(argument, data_dir)
    features, keys = builder.info.features, builder.info.supervised_keys
    if keys != ("image", "label") or not hasattr(features["label"], "names"):
        raise UserError(f"TFDS data set {name} is not for image classification (image -> label)")
    shape = features["image"].shape
    if not size and None in shape:
        raise UsageError(f"the images of {name} differ in size: give --image_size, such as 224")
    size = size or tuple(shape[:2])
    _prepare(builder, name)

    def read(split):
        return _read(builder, split, size, rule, f"{name} {split}", cache)

    available = builder.info.splits
    if "train" not in available:
        raise UserError(f"TFDS data set {name} has no split train; it has {', '.join(available)}")

    def say(why):
        few = f"{TEST_FRACTION:.0%} of each class of train are"
        used = "validation is" if "validation" in available else few
        print(f"splits    {name}: {why}; {used} the test split", file=sys.stderr, flush=True)

    is_withheld = "test" in available and _are_withheld(builder, "test")
    if "test" not in available or is_withheld:
        say(WITHHELD if is_withheld else "it has no test split")
    train = read("train")
    val = read("validation") if "validation" in available else None
    test = read("test") if "test" in available and not is_withheld else None
    if test and test.labels.min() < 0:  # not the first of them
        say(WITHHELD)
        test = None
    if test is None and val is not None:
        val, test = None, val
    if test is None:
        held_out = hold_out(train.labels, TEST_FRACTION, seed=0)
        test, train = train.take(np.flatnonzero(held_out)), train.take(np.flatnonzero(~held_out))
    return Splits(train, val, test, tuple(features["label"].names), where=name)


def _builder(name: str, data_dir: str | None):
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    try:
        if not re.fullmatch(r"\w+(/[\w.+-]+)?", name):
            raise tfds.core.DatasetNotFoundError(name)
        _check_features(data_dir or tfds.core.constants.DATA_DIR, name)
        return tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except tfds.core.DatasetNotFoundError:
        raise UsageError(
            f"unknown data set {name!r}: neither folder:PATH, archive:PATH, digits nor a name "
            "listed at https://www.tensorflow.org/datasets/catalog"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"TFDS data set {name} cannot be opened: {reason(error)}") from None


def _check_features(data_dir: str, name: str) -> None:
    """Refuses a prepared data set whose features.json names code that TFDS would import."""

    def check(found: dict) -> None:
        for key in ("type", "pythonClassName", "python_class_name"):  # of both of its forms
            module = str(found.get(key, ""))
            if "." in module and not module.startswith("tensorflow_datasets."):
                raise ValueError(f"it names {module!r}, which is not a feature of TFDS")

    folder = pathlib.Path(data_dir).expanduser() / name.partition("/")[0]
    for path in sorted(folder.glob("**/features.json")):
        try:
            json.loads(read(path, MAX_FEATURES), object_hook=check)
        except Exception as error:  # A damaged file can raise almost anything.
            raise UserError(f"{path} is invalid: {reason(error)}") from None


def _prepare(builder, name: str) -> None:
    if builder.data_path.exists():
        return
    try:
        _check_connection(builder)
        print(f"downloading {name} to {builder.data_path}", flush=True)
        builder.download_and_prepare()
    except Exception as error:  # Whatever fails here, the user needs another way to the data.
        raise UserError(f"{name} cannot be downloaded ({reason(error)}); {OTHER_WAYS}") from None


def _check_connection(builder) -> None:
    """Raises OSError if the data set's first host cannot be reached."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    for url in map(urllib.parse.urlsplit, list(builder.url_infos or ())[:1]):
        port = url.port or (80 if url.scheme == "http" else 443)
        try:
            socket.create_connection((url.hostname, port), CONNECT_TIMEOUT).close()
        except OSError as error:
            raise OSError(f"no connection to {url.hostname}: {reason(error)}") from None


def _read(builder, split: str, size: tuple[int, int], rule: str, where: str, cache: Cache) -> Split:
    info = builder.info.splits[split]
    key = {"source": "tfds", "name": builder.info.full_name, "split": split}
    key |= {"files": _files(info), "image_size": size}
    key |= {"resize": rule} if rule != STRETCH else {}  # Earlier entries are stretched.

    def fill(write):
        damaged, again = f"{where} cannot be read", "prepare it again"
        try:
            batches = _batches(builder, split, size, rule)
        except Exception as error:  # Each format has its own errors for files that are missing.
            raise UserError(f"{damaged}: {reason(error)}; {again}") from None
        labels, position = np.empty(info.num_examples, np.int64), 0
        try:
            for pixels, batch_labels in batches.as_numpy_iterator():
                stop = position + len(pixels)
                if stop <= len(labels):
                    labels[position:stop] = batch_labels
                    write(position, pixels)
                position = stop
        except tf.errors.OpError as error:
            raise UserError(f"{damaged}: {reason(error)}; {again}") from None
        if position != len(labels):
            raise UserError(f"{where} has {position} images instead of {len(labels)}; {again}")
        return labels

    return cache.find(key) or cache.make(key, (info.num_examples, *size, 3), where, fill)


def _files(info) -> str:
    """A hash of names, sizes and both ends of a split's files: to read all of ImageNet takes long."""
    digest = hashlib.sha256()
    for path in info.filepaths:
        digest.update(path.name.encode())
        with contextlib.suppress(OSError, tf.errors.OpError):  # Reading it will say why.
            length = path.stat().length
            with path.open("rb") as file:
                digest.update(b"%d" % length + file.read(ENDS))
                file.seek(max(0, length - ENDS))
                digest.update(file.read(ENDS))
    return digest.hexdigest()


def _are_withheld(builder, split: str) -> bool:
    """Whether the first labels of a split are negative, as those of ImageNet's test images."""
    try:
        labels = [label for _, label in _examples(builder, split).take(PEEK).as_numpy_iterator()]
    except Exception:  # Reading it will say why.
        return False
    return min(labels, default=0) < 0


def _batches(builder, split: str, size: tuple[int, int], rule: str) -> tf.data.Dataset:
    """(uint8 [n, H, W, 3], int64 [n]), decoded here, so that training sees what serving will see."""

    def decode(encoded, label):
        return resize_images(decode_image(encoded), size, rule), label

    dataset = _examples(builder, split).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(in_block((*size, 3))).prefetch(2)


def _examples(builder, split: str) -> tf.data.Dataset:
    """(an encoded image, its label int64) of each example, in the order of the files."""
    import tensorflow_datasets as tfds

    options = {"split": split, "decoders": {"image": tfds.decode.SkipDecoding()}}
    if builder.info.file_format in tfds.core.file_adapters.FileFormat.with_random_access():
        source = builder.as_data_source(**options)  # array_record, which has no tf.data.Dataset
        dataset = tf.data.Dataset.from_generator(
            lambda: ((example["image"], example["label"]) for example in source),
            output_signature=(tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int64)),
        )
    else:
        dataset = builder.as_dataset(
            **options,
            as_supervised=True,
            shuffle_files=False,
            read_config=tfds.ReadConfig(try_autocache=False),  # It is read once.
        )
    return without_autotune(dataset)
