"""The history of a run as TensorBoard scalars, with the tags of keras.callbacks.TensorBoard."""

import pathlib
import shutil

import tensorflow as tf

from keras_cifar.core.errors import unwritten

NOT_SHOWN = ("epoch", "seconds")


class Scalars:
    """Event files in `directory`, recreated with the history so far: each epoch is there once.

    Raises:
        UserError: the directory cannot be written, for example because the disk is full.
    """

    def __init__(self, directory: pathlib.Path, history: list[dict]):
        self._directory, self._writers = directory, {}
        for name in ("train", "validation"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for row in history:
            self.add(row)

    def add(self, row: dict) -> None:
        """Writes a row of the history; epochs count from 0, as in Keras."""
        try:
            for name, value in row.items():
                if name in NOT_SHOWN:
                    continue
                writer = self._writer("validation" if name.startswith("val_") else "train")
                with writer.as_default(row["epoch"] - 1):
                    tf.summary.scalar(f"epoch_{name.removeprefix('val_')}", value)
            for writer in self._writers.values():
                writer.flush()
        except tf.errors.OpError as error:
            raise unwritten(self._directory, error) from None

    def _writer(self, name: str) -> tf.summary.SummaryWriter:
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self._directory / name))
        return self._writers[name]
