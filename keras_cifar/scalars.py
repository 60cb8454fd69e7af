"""The history of a run as TensorBoard's scalars, with the tags of keras.callbacks.TensorBoard."""

import pathlib
import shutil

import tensorflow as tf

NOT_SHOWN = ("epoch", "seconds")


class Scalars:
    """Event files in `directory`, which begin anew with the history so far.

    So they have each epoch once, however often and wherever a run was interrupted.
    """

    def __init__(self, directory: pathlib.Path, history: list[dict]):
        self._directories = {name: directory / name for name in ("train", "validation")}
        for path in self._directories.values():
            shutil.rmtree(path, ignore_errors=True)
        self._writers = {}
        for row in history:
            self.add(row)

    def add(self, row: dict) -> None:
        """Writes a row of the history; epochs count from 0 here, as Keras's do."""
        for name, value in row.items():
            if name in NOT_SHOWN:
                continue
            held_out = name.startswith("val_")
            with self._writer("validation" if held_out else "train").as_default(row["epoch"] - 1):
                tf.summary.scalar(f"epoch_{name.removeprefix('val_')}", value)
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, name: str) -> tf.summary.SummaryWriter:
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self._directories[name]))
        return self._writers[name]
