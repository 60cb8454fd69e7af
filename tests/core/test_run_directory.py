"""The run directory's files: whole or not there."""

import json
import os

import pytest

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import replacing, versions, write_json
from keras_cifar.core.run_directory import Run


def test_replacing_keeps_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_replacing_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x" / "m.keras"
    with replacing(path) as temporary:
        assert temporary.name == "m.keras"  # Keras needs the suffix.
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_versions_are_integers_in_order(tmp_path):
    for name in ("10", "9", "tmp", ".export-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")
    assert versions(tmp_path) == [9, 10]
    assert versions(tmp_path / "none") == []


def config() -> dict:
    """As much of a config.json as is read."""
    return {
        "flags": TrainConfig().flags(),
        "class_names": ["a", "b"],
        "image_shape": [32, 32, 3],
        "splits": {"train": {"count": 5, "fingerprint": "f"}},
    }


def refusal(run: Run) -> str:
    with pytest.raises(UserError) as caught:
        run.read_config()
    message = str(caught.value)
    assert message.startswith(f"{run.config} is damaged: ")
    assert message.isprintable()
    return message


def test_a_config_with_flags_of_later_versions_is_read(tmp_path):
    run, value = Run(tmp_path), config()
    value["flags"]["later"] = 1
    del value["flags"]["ema"]
    value["flags"]["learning_rate"] = 1  # as `TrainConfig.from_flags(learning_rate=1)` is written
    write_json(run.config, value)
    value["paths"] = {}  # cifar10 has none
    value["flags"] |= {"ema": 0.0, "resize": "stretch"}  # its default, what its default means
    assert run.read_config() == value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("flags", value) for value in ([], "data", None, {})),
        *(("class_names", value) for value in ({}, [], "ab", [1], None)),
        *(("image_shape", value) for value in ({}, [32, 32], [32, 32, 1], [0, 32, 3], "abc")),
        *(("image_shape", value) for value in ([True, 32, 3], [10**6, 32, 3], [32.0, 32, 3])),
        *(("paths", value) for value in ([1], "x", {"data": 1}, {"data": None})),
        *(("splits", value) for value in ([], [1], "x", {"train": 5}, {"train": {"count": 5}})),
        *(("flags/seed", value) for value in ("1", None, True, 1.5, -1, [1])),
        *(("flags/data", value) for value in (1, None, ["digits"], {"a": 1})),
        *(("flags/data_dir", value) for value in (1, ["/"], False)),
        *(("flags/image_size", value) for value in ("32x", "0", 0, True, 1.5)),
        *(("flags/resize", value) for value in ("pad", "crop", 1, None, ["crop"])),
        *(("flags/val_fraction", value) for value in ("0.1", 2, float("nan"), None)),
        *(("flags/export", value) for value in (1, "yes", None)),
    ],
)
def test_what_is_used_of_a_config_has_its_types(tmp_path, place, value):
    run, whole = Run(tmp_path), config()
    above, _, last = place.rpartition("/")
    (whole[above] if above else whole)[last] = value
    run.config.write_text(json.dumps(whole))
    refusal(run)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"flags": {}}', "[" * 100_000, "1" * 10_000, "\0", '"\\ud800'],
    ids=range(8),
)
def test_a_damaged_or_hostile_config_is_refused(tmp_path, text):
    run = Run(tmp_path)
    run.config.write_text(text)
    refusal(run)


def test_a_config_that_is_too_large_or_a_pipe_is_refused(tmp_path):
    run = Run(tmp_path)
    run.config.touch()
    os.truncate(run.config, 2**40)
    assert "larger than" in refusal(run)
    run.config.unlink()
    os.mkfifo(run.config)
    assert "a pipe or a device" in refusal(run)


def test_json_keeps_names_that_are_no_text(tmp_path):
    value = {"x": os.fsdecode(b"caf\xe9"), "y": "日本\n"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text) == value
    assert "日本" in text


def test_a_folder_that_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        Run(tmp_path).read_config()
    with pytest.raises(UserError, match="does not exist"):
        Run(tmp_path / "none").read_config()


def test_a_start_that_fails_leaves_what_was_there(tmp_path):
    there, new = Run(tmp_path / "there"), Run(tmp_path / "new")
    there.path.mkdir(mode=0o750)
    before = there.path.stat()
    for run in (there, new):
        with pytest.raises(RuntimeError), run.locked():
            raise RuntimeError
    assert list(tmp_path.iterdir()) == [there.path]
    assert list(there.path.iterdir()) == []
    assert (there.path.stat().st_ino, there.path.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_lock_within_a_lock_is_the_same_lock(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        with run.locked():
            (run.path / "file").touch()
        with pytest.raises(UserError, match="is in use"), Run(run.path).locked():
            pass
    with Run(run.path).locked():
        pass
