"""Kills a run of training at random instants, starts it again each time, and compares what it leaves.

    python -m tests.training.kills DIRECTORY CASE KILLS [SEED]

The whole run and each start are processes that are forked from this one, which has imported
TensorFlow and not started it. Kills come, in turn, after some seconds, while something is written, and
after some steps. Prints how many there were, how many of them while something was written, and what
differs from the run that was not killed; the status is 1 if anything does.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback

from keras_cifar.core import environment

environment.import_tensorflow()

import numpy as np
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.files import TEMPORARY, versions
from keras_cifar.core.run_directory import Run
from keras_cifar.training import checkpoint, recorder, trainer
from tests.data.test_crops import write_photos
from tests.distributed import strategies

# Two validations, three epochs, checkpoints in the midst and at the ends of epochs.
BASE = {
    "data": "digits",
    "batch_size": 24,
    "epochs": 3,
    "steps_per_epoch": 4,
    "checkpoint_every": 3,
    "precise_bn_batches": 2,
    "augment": "crop(2)|flip|mixup(0.3)",
    "ema": 0.9,
    "lr_schedule": "cosine",
}
SMALL = {"model": "tiny_drop", "image_size": 8, "augment": "crop(1)|flip|mixup(0.3)"}
CASES = {
    "tiny": SMALL,
    "tiny, 2 replicas": SMALL | {"replicas": 2, "accumulate_steps": 2, "steps_per_execution": 2},
    "tiny, 2 replicas, unfrozen": SMALL
    | {"replicas": 2, "accumulate_steps": 2, "freeze": "stage0_relu", "unfreeze_epoch": 1},
    "tiny, resized": SMALL | {"progressive_resizing": "4:0.4,6:0.7"},
    "tiny, crops of files": SMALL
    | {"data": "folder:photos", "batch_size": 8, "augment": "resized_crop|flip|mixup(0.3)"},
    "resnet20": {"model": "resnet20"},
    "resnet20, 2 replicas": {"model": "resnet20", "replicas": 2},
    "vgg_bn_drop": {"model": "vgg_bn_drop"},
    "vgg_bn_drop, 2 replicas": {"model": "vgg_bn_drop", "replicas": 2},
}
# The last step, and the last writing, of a process after which it is killed.
STEPS, WRITINGS = 8, 6
TIMES = ("seconds", "images_per_second")
NOTICES = 0.0005  # seconds between two looks for what is being written


def start(flags: dict, run: Run) -> tuple[int, int]:
    """A process that trains; (its id, a pipe from which a byte can be read for each step)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        log = os.open(run.path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        original = recorder.Recorder.on_train_batch_end

        def counted(self, batch, logs=None):
            original(self, batch, logs)
            os.write(writer, b"x")

        recorder.Recorder.on_train_batch_end = counted
        trainer.train(TrainConfig.from_flags(**BASE | flags, run_dir=str(run.path)), run)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def written(run: Run) -> set[pathlib.Path]:
    """What is being written."""
    places = (run.path, run.checkpoint, run.export, run.path / "eval")
    return {path for place in places for path in place.glob(f"{TEMPORARY}*")}


def is_over(child: int) -> bool:
    return bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def wait_for(kind: int, child: int, steps: int, run: Run, chance: random.Random, seconds: float):
    """Returns at the instant at which to kill, or when the process is over."""
    if kind == 0:
        time.sleep(chance.uniform(0, seconds))
    elif kind == 1:
        seen, number = written(run), chance.randint(1, WRITINGS)
        while number and not is_over(child):
            new = written(run) - seen
            seen |= new
            number -= bool(new)
            time.sleep(NOTICES)
    else:
        for _ in range(chance.randint(1, STEPS)):
            os.read(steps, 1)  # also at the end of the process
        time.sleep(chance.uniform(0, 0.1))


def kill(child: int, run: Run) -> tuple[bool, bool]:
    """Kills a process; (whether it still lived, whether it was writing)."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, run.path.with_suffix(".log").read_text()[-4000:]
        return False, False
    return True, bool(written(run))


def trained(run: Run) -> dict[str, str]:
    """What training leaves, but for times."""
    variables, position = saved_state(run.checkpoint)
    found = {"variables of the checkpoint": variables}
    position |= {"history": without_times(position["history"]), "seconds": 0}
    found["position of the checkpoint"] = json.dumps(position)
    found["history.csv"] = json.dumps(without_times(run.read_history()))
    found["TensorBoard"] = json.dumps(scalars(run))
    found["model.keras"] = digest(models.load(run.model).get_weights())
    return found


def results(run: Run) -> dict[str, str]:
    """What training, the test and the export leave, but for times."""
    found = trained(run) | {"test.json": run.evaluation("test").read_text()}
    (number,) = versions(run.export)
    version = run.export / str(number)
    reader = tf.train.load_checkpoint(str(version / "variables" / "variables"))
    names = sorted(name for name in reader.get_variable_to_shape_map() if name[0] != "_")
    found["exported variables"] = digest(reader.get_tensor(name) for name in names)
    shape = run.read_config()["image_shape"]
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
    served = tf.saved_model.load(str(version)).signatures["serving_default"]
    found["exported model"] = digest([served(tf.constant(images))["probabilities"].numpy()])
    left = [path.name for path in run.path.rglob(f"{TEMPORARY}*")]
    found["what is left of writing"] = " ".join(left)
    return found


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def saved_state(directory: pathlib.Path) -> tuple[str, dict]:
    """(a digest of all variables, the position) of the newest whole checkpoint."""
    _, data = checkpoint.read(directory)
    end = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[end:]).hexdigest(), json.loads(
        json.loads(data[8:end])["__metadata__"]["position"]
    )


def digest(arrays) -> str:
    """Equal for equal bits. Where two differ, pytest has no megabytes to compare, which takes hours."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def scalars(run: Run) -> list:
    found = []
    for file in run.tensorboard.rglob("events.*"):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.tag.removeprefix("epoch_") not in TIMES:
                    number = float(tf.make_ndarray(value.tensor))
                    found.append([file.parent.name, value.tag, event.step, number])
    return sorted(found)


def compute(action) -> dict:
    """What `action` returns, computed in a process of its own: TensorFlow must not start in this."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            with os.fdopen(writer, "w") as pipe:
                json.dump(action(), pipe)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def differences(one: Run, two: Run) -> list[str]:
    first, second = results(one), results(two)
    return [name for name in first if first[name] != second[name]]


def main(directory: str, case: str, kills: str, seed: str = "0") -> int:
    strategies.register()
    root, flags, chance = pathlib.Path(directory).resolve(), CASES[case], random.Random(int(seed))
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    write_photos(root / "photos")
    # A fork has no other thread than the one that calls for it.
    assert len(os.listdir("/proc/self/task")) == 1
    whole = Run(root / "whole")
    began = time.monotonic()
    _, status = os.waitpid(start(flags, whole)[0], 0)
    seconds = time.monotonic() - began
    assert status == 0, whole.path.with_suffix(".log").read_text()
    done = writing = runs = 0
    different = {}
    while done < int(kills):
        runs += 1
        run = Run(root / f"killed{runs}")
        finished = False
        while not finished:
            child, steps = start(flags, run)
            if done < int(kills):
                wait_for(done % 3, child, steps, run, chance, seconds)
                lived, wrote = kill(child, run)
                finished, done, writing = not lived, done + lived, writing + wrote
            else:
                _, status = os.waitpid(child, 0)
                assert status == 0, run.path.with_suffix(".log").read_text()[-4000:]
                finished = True
            os.close(steps)
        if found := compute(lambda run=run: differences(whole, run)):
            different[run.path.name] = found
        else:
            shutil.rmtree(run.path)
    print(
        json.dumps({"kills": done, "while writing": writing, "runs": runs, "different": different})
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
