"""Reads `.keras` files, which somebody else may have written."""

import json
import pathlib
import sys
import textwrap
import zipfile

import keras

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import open_file, size_of
from keras_cifar.models import layers  # noqa: F401  A saved model may have our layers.

MEMBERS = ("config.json", "metadata.json", "model.weights.h5")
MAX_CONFIG = 2**25  # bytes of config.json, six times those of resnet1202
MAX_REASON = 300  # characters; Keras may quote the whole configuration


def load(path: pathlib.Path) -> keras.Model:
    """Loads the plain functional model of a `.keras` file.

    Keras's safe mode refuses layers that run code or read other files, and objects that are neither
    Keras's nor registered here.

    Raises:
        UserError: the file is missing or damaged, or has more in it than a network and its weights.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: the run has not completed an epoch")
    handled = sys.exception()  # by the caller; it says nothing about the file
    try:
        _check_size(path)
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # A damaged file can fail anywhere in Keras, h5py or zipfile.
        cause = error  # the first of a chain in which Keras repeats the configuration
        while cause.__context__ not in (None, handled):
            cause = cause.__context__
        why = textwrap.shorten(reason(cause), MAX_REASON)
        raise UserError(f"{path} cannot be loaded: {why}") from None


def _check_size(path: pathlib.Path) -> None:
    """Raises ValueError where Keras would need much more memory than a file has bytes."""
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        if sorted(archive.namelist()) != sorted(MEMBERS):
            raise ValueError(f"it holds other files than {', '.join(MEMBERS)}")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its files are compressed, which Keras does not do")
        if archive.getinfo("config.json").file_size > MAX_CONFIG:
            raise ValueError(f"its config.json has more than {MAX_CONFIG:,} bytes")
        config = json.loads(archive.read("config.json"))
        stored = size_of(file)
    # A number in config.json can ask for any amount of memory. Nothing is allocated here.
    with keras.StatelessScope(initialize_variables=False):
        needed = 2 * keras.saving.deserialize_keras_object(config, safe_mode=True).count_params()
    if needed > stored:  # of float16, the smallest that a weight can be
        raise ValueError(
            f"its network needs at least {needed:,} bytes of weights and it has {stored:,}"
        )
