"""Checkpoints: the full training state after a step, from which a run resumes exactly.

A checkpoint is one safetensors file whose name holds the step and a checksum of the contents. It is
written to a temporary name, flushed to the disk and renamed; the previous checkpoint is kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re

import numpy as np

from keras_cifar.core import tensors
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import open_file, replacing
from keras_cifar.models.classifier import Classifier, get_scaling, set_scaling

KEPT = 2  # checkpoints: the newest, and the previous one in case the newest is damaged

FORMAT = "step-{step:09d}-epoch-{epochs:05d}-{checksum}.safetensors"
_NAME = re.compile(r"step-(\d+)-epoch-(\d+)-([0-9a-f]{32})\.safetensors")
_PROGRESS = "position"  # the metadata key of the training progress
_SCALING = "scaling"  # that of the pixels, which is no variable


@dataclasses.dataclass(frozen=True)
class TrainingProgress:
    """How far a run is, and its metrics so far."""

    history: list[dict] = dataclasses.field(default_factory=list)  # a row for each completed epoch
    steps: int = 0  # completed in the current epoch
    totals: tuple[float, ...] = ()  # the sums of `training_step.METRICS` over these steps
    seconds: float = 0.0  # the time of these steps
    rollbacks: int = 0  # returns to a checkpoint because the loss was not finite

    def step(self, steps_per_epoch: int) -> int:
        """The number of steps since the start of the run."""
        return len(self.history) * steps_per_epoch + self.steps


def _variables(model: Classifier) -> list:
    """Everything that the next step depends on: weights, random states, optimizer, averages."""
    # `variables` includes the seeds of dropout, which no Keras file format saves.
    return [*model.variables, *model.optimizer.variables, *model.averages]


def _arrays(model: Classifier) -> dict[str, np.ndarray]:
    arrays = (np.asarray(variable.numpy(), order="C") for variable in _variables(model))
    return {f"variable_{i}": array for i, array in enumerate(arrays)}


def _checksum(*chunks: bytes | np.ndarray) -> str:
    checksum = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        checksum.update(chunk)
    return checksum.hexdigest()


def digest(model: Classifier) -> str:
    """A hash of the model's full state; equal states have equal bits."""
    return _checksum(*_arrays(model).values())


def save(
    directory: pathlib.Path, model: Classifier, progress: TrainingProgress, step: int
) -> pathlib.Path:
    """Writes a checkpoint of `step`, counted from the start of the run, and returns its file.

    Removes all others except the KEPT - 1 before it.
    """
    metadata = {_PROGRESS: dataclasses.asdict(progress), _SCALING: get_scaling(model)}
    data = tensors.save(_arrays(model), {key: json.dumps(x) for key, x in metadata.items()})
    epochs = len(progress.history)
    path = directory / FORMAT.format(step=step, epochs=epochs, checksum=_checksum(data))
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    files = _files(directory)
    newest = files.index(path)
    # Files of later steps are damaged: the run resumed from a checkpoint before them.
    for other in files[:newest] + files[newest + KEPT :]:
        other.unlink(missing_ok=True)
    return path


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a directory, the newest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def exists(directory: pathlib.Path) -> bool:
    """Whether there is a checkpoint, intact or damaged."""
    return bool(_files(directory))


def read(directory: pathlib.Path) -> tuple[pathlib.Path | None, bytes]:
    """(file, contents) of the newest intact checkpoint; (None, b"") where there is no checkpoint.

    Prints a line if a newer one is damaged; raises UserError if all are.
    """
    damaged = []
    for path in _files(directory):
        data = b""
        with contextlib.suppress(OSError), open_file(path) as file:
            data = file.readall()
        if _checksum(data) == _NAME.fullmatch(path.name)[3]:
            if damaged:
                print(
                    f"checkpoint {damaged[0]} is damaged; resuming from the previous one, {path.name}",
                    flush=True,
                )
            return path, data
        damaged.append(path.name)
    if damaged:
        raise UserError(
            f"all checkpoints in {directory} are damaged: {', '.join(damaged)}; train with another "
            "--run_dir, where --init_from takes the weights of this run's model.keras"
        )
    return None, b""


def assign(model: Classifier, data: bytes, source: str | pathlib.Path) -> TrainingProgress:
    """Sets a model to the state in a checkpoint.

    Args:
        source: the file or the worker that the data comes from, for messages.

    Raises:
        UserError: the data is not a checkpoint, or is of another network or optimizer.
    """
    try:
        metadata = tensors.load_metadata(data)
        stored = json.loads(metadata[_PROGRESS])
        scaling = json.loads(metadata.get(_SCALING, "null"))  # Earlier revisions have none.
        progress = TrainingProgress(**stored | {"totals": tuple(stored["totals"])})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"checkpoint {source} is damaged") from None
    try:
        arrays = tensors.load(data, _arrays(model))
    except ValueError:
        raise UserError(f"checkpoint {source} is of another network or optimizer") from None
    for variable, array in zip(_variables(model), arrays.values(), strict=True):
        variable.assign(array)
    if scaling:
        set_scaling(model, tuple(scaling))
    return progress
