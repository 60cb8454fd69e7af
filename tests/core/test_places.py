"""Flags that name places: absolute in config.json, found where the place is now."""

import pathlib

import pytest

from keras_cifar.core import places
from keras_cifar.core.config import DEFAULTS, TrainConfig


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("data", "folder:a/../b/", "folder:HERE/b"),
        ("data", "archive:a.tar.gz", "archive:HERE/a.tar.gz"),
        ("data", "folder:~/a", "folder:/home/me/a"),
        ("data", "folder:/a:b", "folder:/a:b"),
        ("data_dir", "a", "HERE/a"),
        ("cache_dir", ".", "HERE"),
        ("init_from", "runs/a", "HERE/runs/a"),
    ],
)
def test_paths_are_recorded_absolute(here, name, value, path):
    path = path.replace("HERE", str(here))
    assert places.absolute(name, value) == path
    assert places.recorded(DEFAULTS | {name: value}) == {name: path}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("data", value) for value in ("cifar10", "digits", "mnist/3dc", "folder:")),
        *(("init_from", value) for value in ("imagenet", "pretrained:fast", "hf:a/b")),
        ("data_dir", "gs://bucket/a"),
    ],
)
def test_what_is_no_path_stays(name, value):
    assert places.absolute(name, value) == value
    assert places.recorded(DEFAULTS | {name: value}) == {}


def test_a_place_is_found_where_it_was_or_else_as_it_was_given(here, monkeypatch):
    flags = DEFAULTS | {"data": "folder:a", "data_dir": "d"}
    config = {"flags": flags, "paths": places.recorded(flags)}
    (here / "elsewhere" / "a").mkdir(parents=True)
    (here / "a").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert places.find(config, "data") == f"folder:{here / 'a'}"
    (here / "a").rmdir()
    assert places.find(config, "data") == "folder:a"
    (here / "elsewhere" / "a").rmdir()
    assert places.find(config, "data") == f"folder:{here / 'a'}"  # for the message
    assert places.find(config, "data_dir") == str(here / "d")
    assert places.find(config, "cache_dir") is None
    assert places.find({"flags": DEFAULTS, "paths": {}}, "data") == "cifar10"


def test_what_was_recorded_of_a_relative_path_stays_and_an_absolute_one_is_itself(here):
    before = {"data": "folder:/then", "init_from": "/x", "later": "y"}
    flags = DEFAULTS | {"data": "folder:a", "cache_dir": "c"}
    expected = {"data": "folder:/then", "cache_dir": str(here / "c")}
    assert places.recorded(flags, before) == expected
    edited = flags | {"data": "folder:/edited"}
    assert places.recorded(edited, before) == expected | {"data": "folder:/edited"}


@pytest.mark.parametrize("name", ["data", "init_from"])
def test_the_same_place_by_another_name_is_no_difference(here, monkeypatch, name):
    kind = "folder:" if name == "data" else ""

    def named(path) -> TrainConfig:
        return TrainConfig.from_flags(**{name: f"{kind}{path}"})

    before = named("a")
    paths = places.recorded(before.flags())
    # A run of an earlier revision has no paths.
    for path in ("a", "./a/", here / "a"):
        assert named(path).differences(before.flags()) == []
    assert len(named("b").differences(before.flags())) == 1
    monkeypatch.chdir("/")
    for path in ("a", here / "a"):
        assert named(path).differences(before.flags(), paths) == []
    assert len(named(here / "b").differences(before.flags(), paths)) == 1
    assert len(named(here / "a").differences(before.flags())) == 1
