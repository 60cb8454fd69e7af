"""The state of a run after a step: everything that decides the rest of it.

A checkpoint is one file of arrays (`tensors`), whose name has the step and a checksum of its contents.
It is written under another name, put on the disk and renamed, and the one before it is kept.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from keras_cifar.core import tensors
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import open_file, replacing
from keras_cifar.models.classifier import Classifier
from keras_cifar.models.training_step import METRICS

KEPT = 2  # checkpoints: the newest, and one to go back to where that is damaged

FORMAT = "step-{step:09d}-epoch-{epochs:05d}-{checksum}.safetensors"
_NAME = re.compile(r"step-(\d+)-epoch-(\d+)-([0-9a-f]{32})\.safetensors")


@dataclasses.dataclass(frozen=True)
class TrainingProgress:
    """Where a run is, and what it has found so far.

    Attributes:
        history: a row for each epoch that is complete.
        steps: done in the epoch after these.
        totals: the sums of `training_step.METRICS` over these steps.
        seconds: that these steps took.
        rollbacks: how often the run went back because the loss was not finite.
    """

    history: list[dict] = dataclasses.field(default_factory=list)
    steps: int = 0
    totals: tuple[float, ...] = ()
    seconds: float = 0.0
    rollbacks: int = 0

    def step(self, steps_per_epoch: int) -> int:
        """Of the run."""
        return len(self.history) * steps_per_epoch + self.steps


def _variables(model: Classifier) -> list:
    """Everything that decides the next step: weights, random states, optimizer, averages."""
    # `variables` has the seeds of dropout, which no Keras file format keeps.
    return [*model.variables, *model.optimizer.variables, *model.averages]


def _arrays(model: Classifier) -> dict[str, np.ndarray]:
    variables = enumerate(_variables(model))
    return {f"variable_{i}": np.asarray(variable.numpy(), order="C") for i, variable in variables}


def _checksum(parts: Iterable) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def digest(model: Classifier) -> str:
    """A hash of everything that a checkpoint has of a model: equal for equal bits only."""
    return _checksum(_arrays(model).values())


def save(
    directory: pathlib.Path, model: Classifier, position: TrainingProgress, step: int
) -> pathlib.Path:
    """Writes a checkpoint and removes all but this one and KEPT - 1 before it.

    Args:
        step: of the run.

    Returns:
        The file.
    """
    position_text = json.dumps(dataclasses.asdict(position))
    parts = tensors.pack(_arrays(model), {"position": position_text})
    path = directory / FORMAT.format(
        step=step, epochs=len(position.history), checksum=_checksum(parts)
    )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)
    files = _files(directory)
    mine = files.index(path)
    # Of later ones nothing became of this run: they are damaged.
    for other in files[:mine] + files[mine + KEPT :]:
        other.unlink(missing_ok=True)
    return path


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a directory, the newest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _position(values: dict) -> TrainingProgress:
    """The position that was stored.

    Raises:
        ValueError, TypeError: it is none.
    """
    position = TrainingProgress(**values | {"totals": tuple(values["totals"])})
    rows = position.history
    counts = (position.steps, position.rollbacks)
    right = (
        isinstance(rows, list)
        and all(row.keys() == rows[0].keys() for row in rows)
        and [row.get("epoch") for row in rows] == list(range(1, len(rows) + 1))
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and len(position.totals) in (0, len(METRICS))
    )
    numbers = [*position.totals, position.seconds]
    numbers += [value for row in rows for value in row.values()]
    if not right or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError
    return position


def exists(directory: pathlib.Path) -> bool:
    """Whether there is a checkpoint, whole or damaged."""
    return bool(_files(directory))


def read(directory: pathlib.Path) -> tuple[pathlib.Path | None, bytes]:
    """(file, contents) of the newest checkpoint that is whole; (None, b"") where there is none.

    Of each that is damaged a line is printed.

    Raises:
        UserError: all are damaged.
    """
    files, damaged = _files(directory), []
    for path in files:
        try:
            with open_file(path) as file:
                data = file.readall()
        except OSError:
            data = b""
        if _checksum([data]) == _NAME.fullmatch(path.name)[3]:
            if damaged:
                print(
                    f"checkpoint {damaged[0]} is damaged; going on from the one before, {path.name}",
                    flush=True,
                )
            return path, data
        damaged.append(path.name)
    if damaged:
        raise UserError(
            f"no checkpoint in {directory} is whole: {' and '.join(damaged)} are damaged; start "
            "anew with another --run_dir, where --init_from takes the weights of this one's model.keras"
        )
    return None, b""


def assign(model: Classifier, data: bytes, where: str | pathlib.Path) -> TrainingProgress:
    """Gives a model the state of a checkpoint.

    Args:
        data: its contents.
        where: it comes from, for messages.

    Raises:
        UserError: it is no checkpoint, or of another network or optimizer.
    """
    try:
        position = _position(json.loads(tensors.metadata(data)["position"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"checkpoint {where} is damaged") from None
    try:
        arrays = tensors.unpack(data, _arrays(model))
    except ValueError:
        raise UserError(f"checkpoint {where} is of another network or optimizer") from None
    for variable, array in zip(_variables(model), arrays.values(), strict=True):
        variable.assign(array)
    return position
