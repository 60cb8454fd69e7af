"""The run directory's files: whole or not there."""

import pytest

from keras_cifar.errors import UserError
from keras_cifar.run import Run, next_version, replacing, versions, write_json


def test_replacing_keeps_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_replacing_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x" / "y.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["y.json"]


def test_the_file_keeps_its_suffix_while_it_is_written(tmp_path):
    with replacing(tmp_path / "m.keras") as temporary:
        assert temporary.name == "m.keras"
        temporary.write_text("")


def test_versions_are_integers_in_order(tmp_path):
    for name in ("10", "9", "tmp", ".export-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")
    assert versions(tmp_path) == [9, 10]
    assert next_version(tmp_path) == 11
    assert next_version(tmp_path / "none") == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"flags": {}}'])
def test_a_damaged_config_is_one_line_with_its_name(tmp_path, text):
    run = Run(tmp_path)
    run.config.write_text(text)
    with pytest.raises(UserError) as caught:
        run.read_config()
    assert str(run.config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        Run(tmp_path).read_config()
    with pytest.raises(UserError, match="does not exist"):
        Run(tmp_path / "none").read_config()
