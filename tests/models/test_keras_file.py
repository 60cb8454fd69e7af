"""`.keras` files that are damaged, or made to do something else than to hold a network."""

import base64
import functools
import json
import marshal
import os
import pathlib
import tempfile
import zipfile

import keras
import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core.errors import UserError


@functools.cache
def saved() -> dict[str, bytes]:
    """The members of a file of lenet5."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.keras")
        models.build("lenet5").deployable.save(file)
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "m.keras"


def write(path, change=None, files=None, compression=zipfile.ZIP_STORED) -> None:
    """Writes the network, with its config.json changed or with other members."""
    contents = saved() | (files or {})
    if change:
        config = json.loads(contents["config.json"])
        change(config)
        contents["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in contents.items():
            archive.writestr(name, value)


def refused(path) -> str:
    """Why it is refused."""
    with pytest.raises(UserError) as error:
        models.load(path)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be loaded: ")
    assert message.isprintable()
    assert len(message) < 500
    return message.removeprefix(f"{path} cannot be loaded: ")


def test_file_that_keras_saved_is_loaded(path):
    model = models.build("lenet5").deployable
    model.save(path)
    for got, expected in zip(models.load(path).weights, model.weights, strict=True):
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_missing_file_is_an_error_of_one_line(path):
    with pytest.raises(UserError, match="does not exist") as error:
        models.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_damaged_file_is_refused(damage, path):
    write(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle : middle + 64])
    contents = {
        "empty": b"",
        "text": b"no model at all\n",
        "truncated": whole[:middle],
        "flipped": whole[:middle] + flipped + whole[middle + 64 :],
    }
    path.write_bytes(contents[damage])
    assert refused(path)


# ---- Code, other files, memory


def in_layer(**values):
    def change(config):
        layers = [x for x in config["config"]["layers"] if x["class_name"] == "Dense"]
        layers[-1].update(values)

    return change


def lambda_layer(code: str):
    """A Lambda layer as Keras stores one whose function runs `code`."""
    stored = base64.b64encode(marshal.dumps(compile(code, "x", "eval"))).decode()
    function = {"class_name": "__lambda__", "config": {"code": stored, "defaults": None}}
    return in_layer(
        module="keras.layers", class_name="Lambda", config={"name": "x", "function": function}
    )


def reading(kind: str):
    """A layer that would read its vocabulary from a file."""
    config = getattr(keras.layers, kind)().get_config() | {"vocabulary": "/etc/passwd"}
    return in_layer(class_name=kind, config=config)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda_layer("open('made', 'w')"), "lambda"),
        (in_layer(module="os", class_name="system", config="touch made"), "system"),
        (in_layer(module="subprocess", class_name="Popen", config={"args": "touch made"}), "Popen"),
        (in_layer(module="mine.of.it", class_name="Other", registered_name="Other"), "'Other'"),
        (in_layer(registered_name="Other>Dense"), "Other>Dense"),
        (in_layer(class_name="TFSMLayer", config={"filepath": "/tmp/m"}), "TFSMLayer"),
        (in_layer(class_name="TorchModuleWrapper", config={"module": "AAAA"}), "orch"),
        (reading("TextVectorization"), "a vocabulary file"),
        (reading("StringLookup"), "a vocabulary file"),
        (reading("IntegerLookup"), "a vocabulary file"),
        (in_layer(module="keras.utils", class_name="get_file", config={"origin": "x"}), "get_file"),
        (in_layer(module="keras.config", class_name="enable_unsafe_deserialization"), "unsafe"),
        (in_layer(config={"name": "x", "units": 10**9}), "bytes of weights"),
        (in_layer(config={"name": "x", "units": -1}), "units"),
        (in_layer(config={"name": "x", "units": 1, "activation": {"module": "os"}}), ""),
        (lambda c: c.update(class_name="__typespec__", module="builtins"), ""),
        (lambda c: c.clear(), ""),
    ],
    ids=["lambda", "os", "popen", "module", "package", "saved_model", "torch", "text", "string",
         "integer", "function", "switch", "memory", "negative", "activation", "typespec",
         "nothing"],
)  # fmt: skip
def test_configuration_that_names_something_else_is_refused(path, change, why, monkeypatch):
    monkeypatch.chdir(path.parent)
    write(path, change)
    assert why in refused(path)
    assert [p.name for p in path.parent.iterdir()] == ["m.keras"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_and_compressed_members_are_refused(path):
    for name in ("../x", "/tmp/x", "assets/x"):
        write(path, files={name: b"x"})
        assert "other files" in refused(path)
    write(path)
    with zipfile.ZipFile(path, "a") as archive:  # twice the same
        archive.writestr("config.json", b"{}")
    assert "other files" in refused(path)
    write(path, files={"model.weights.h5": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


@pytest.mark.parametrize("config", [b"[" * 10**6, b'{"a":' * 900 + b"0" + b"}" * 900])
def test_deeply_nested_configuration_is_refused(path, config):
    write(path, files={"config.json": config})
    assert refused(path)


def test_long_configuration_is_refused(path, monkeypatch):
    monkeypatch.setattr(models.keras_file, "MAX_CONFIG", 1000)
    write(path)
    assert "more than 1,000 bytes" in refused(path)


def test_reason_is_of_the_file_while_another_error_is_handled(path):
    path.write_bytes(b"no model")
    alone = refused(path)
    try:
        raise LookupError("another error")
    except LookupError:
        assert refused(path) == alone


def test_pipe_is_refused(path):
    os.mkfifo(path)
    assert "a pipe or a device" in refused(path)
