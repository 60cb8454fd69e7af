"""Input that is made to do harm, through the commands: refused in words, soon, in little memory."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from tests.commands import hostile
from tests.conftest import write_folder
from tests.data.test_archive import Call, dump, members_of, pack, with_member

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Runs commands one after another in one process: importing TensorFlow takes most of the time.
CODE = """
import contextlib, io, json, sys, time
from keras_cifar.core import environment
environment.import_tensorflow()
from keras_cifar import predict, train
from keras_cifar.core import cli, config

COMMANDS = {
    "train": (train.main, config.TrainConfig, ""),
    "predict": (predict.main, predict.PredictOptions, "IMAGE ..."),
}
outcomes = {}
for name, module, argv in json.load(sys.stdin):
    start, out, err = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli._execute(module, *COMMANDS[module], argv)
    outcomes[name] = [status, time.process_time() - start, out.getvalue(), err.getvalue()]
# Not ru_maxrss: a new program begins with that of the process which started it.
(peak,) = [int(x.split()[1]) / 2**10 for x in open("/proc/self/status") if x[:6] == "VmHWM:"]
json.dump([outcomes, peak], sys.stdout)
"""

SECONDS, MEBIBYTES = 5, 1024


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, trained_run):
    """name -> (status, CPU seconds, stdout, stderr) of each command; the peak memory in MiB."""
    root = tmp_path_factory.mktemp("hostile")
    commands = []

    def train(name, spec):
        argv = [f"--data={spec}", "--model=lenet5", f"--run_dir={root / 'run'}", "--epochs=1"]
        commands.append((name, "train", argv))

    def predict(name, path):
        commands.append((name, "predict", [f"--model={trained_run.path}", str(path)]))

    bombs = {
        # 50 KB that claim 1,600 megapixels and hold 50 MB of them, and 900 that are all there.
        "40,000": hostile.png(40_000, 40_000, rows=10_000),
        "30,000": hostile.png(30_000, 30_000, rows=30_000),
    }
    assert len(bombs["40,000"]) == pytest.approx(50_000, rel=0.05)
    assert len(bombs["30,000"]) < 120_000
    for name, contents in bombs.items():
        folder = root / f"folder {name}"
        write_folder(folder, {"train": 6, "test": 3})
        bomb = folder / "train" / "class_1" / "bomb.png"
        bomb.write_bytes(contents)
        train(f"train {name}", f"folder:{folder}")
        predict(f"predict {name}", bomb)

    python = members_of("cifar-10-python")
    pickles = {
        "command": dump({b"data": Call(os.system, f"touch '{root / 'made'}'")}),
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "claim": b"\x80\x02T\xff\xff\xff\x7f.",
        "lists": b"\x80\x02" + b"]" * 30_000_000 + b".",
    }
    for name, contents in pickles.items():
        (root / name).mkdir()
        path = root / name / "a.tar.gz"
        pack(path, "cifar-10-python", python | {"data_batch_1": contents})
        train(f"pickle {name}", f"archive:{path}")
    members = {
        "above": {"name": "../made"},
        "absolute": {"name": str(root / "made")},
        "link": {"name": "made", "kind": tarfile.SYMTYPE, "target": "/etc/passwd"},
        "hard link": {"name": "made", "kind": tarfile.LNKTYPE, "target": "/etc/passwd"},
    }
    for name, member in members.items():
        (root / name).mkdir()
        train(f"member {name}", f"archive:{with_member(root / name, **member)}")

    train("gzip bomb", f"archive:{gzip_bomb(root / 'bomb.tar.gz')}")
    os.mkfifo(root / "pipe.png")
    predict("pipe", root / "pipe.png")
    train("pipe archive", f"archive:{root / 'pipe.png'}")

    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, peak = json.loads(done.stdout)
    assert not (root / "made").exists()
    assert not (root.parent / "made").exists()
    assert not (root / "run").exists()
    return found, peak


def gzip_bomb(path: pathlib.Path) -> pathlib.Path:
    """A megabyte that is a header, which claims a name of 2 GB, and a gigabyte of zeros."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**31
    head, zeros = gzip.compress(info.tobuf()), gzip.compress(bytes(2**24))
    path.write_bytes(head + zeros * 64)  # A gzip file may have several parts.
    return path


CASES = {
    "train 40,000": "bomb.png cannot be read: the image has more than 178,956,970 pixels",
    "predict 40,000": "bomb.png: the image has more than 178,956,970 pixels",
    "train 30,000": "bomb.png cannot be read: the image has more than 178,956,970 pixels",
    "predict 30,000": "bomb.png: the image has more than 178,956,970 pixels",
    "pickle command": "data_batch_1 cannot be read: it names posix.system",
    "pickle memo": "data_batch_1 cannot be read: a dict with data and labels was expected",
    "pickle claim": "data_batch_1 cannot be read: expected 2147483647 bytes",
    "pickle lists": "data_batch_1 cannot be read: it asks for more memory",
    "member above": "'../made' would be written outside of the folder",
    "member absolute": "made' would be written outside of the folder",
    "member link": "'made' is a link or a device",
    "member hard link": "'made' is a link or a device",
    "gzip bomb": "it unpacks to more than 500,000,000 bytes",
    "pipe": "pipe.png: it is a pipe or a device",
    "pipe archive": "it is a pipe or a device",
}


@pytest.mark.parametrize(("case", "words"), CASES.items())
def test_it_is_refused_in_one_line_and_soon(outcomes, case, words):
    status, seconds, out, error = outcomes[0][case]
    assert status == 1
    assert seconds < SECONDS
    (line,) = error.splitlines()
    assert words in line
    if "predict" not in case and case != "pipe":
        assert out == ""


def test_all_of_it_takes_less_than_a_gibibyte(outcomes):
    """TensorFlow, Keras and a model included."""
    assert outcomes[1] < MEBIBYTES
