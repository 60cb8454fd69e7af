"""State dicts of PyTorch are read without it, and nothing in them is run."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from keras_cifar.core.errors import UserError
from keras_cifar.pretrained import state_dict
from tests.pretrained.torch_files import FIXTURES

ROWS = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("name", ["archive.pth", "legacy.pth"])
def test_tensors_of_torch_save(name):
    found = state_dict.load(FIXTURES / name)
    expected = dict.fromkeys(("float", "half", "bfloat16", "long"), ROWS)
    expected |= {"transposed": ROWS.T, "part": ROWS[1:], "scalar": np.array(7)}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key].astype(float), values)
    types = {key: array.dtype.name for key, array in found.items()}
    assert [types[k] for k in ("float", "half", "bfloat16", "long")] == [
        "float32", "float16", "bfloat16", "int64",
    ]  # fmt: skip


def test_tensors_of_safetensors(tmp_path):
    save_file({"module.a": ROWS}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(state_dict.load(tmp_path / "a.safetensors")["a"], ROWS)


class Harmful:
    """A value whose pickle would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def zipped(contents: bytes, name: str = "x/data.pkl", compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, contents)
    return file.getvalue()


@pytest.mark.parametrize("wrap", [lambda x: x, zipped])
def test_no_function_of_a_pickle_is_called(tmp_path, wrap):
    path = tmp_path / "x.pth"
    path.write_bytes(wrap(pickle.dumps(Harmful(tmp_path / "made"))))
    with pytest.raises(UserError, match=r"it names (_?io|builtins)\.open, which no state dict"):
        state_dict.load(path)
    assert not (tmp_path / "made").exists()


LEGACY = (FIXTURES / "legacy.pth").read_bytes()


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("x.pth", b"", "cannot be read"),
        ("x.pth", pickle.dumps({"a": 1}), "not a file of torch.save"),
        ("x.pth", zipped(b"", "x/other"), "not a file of torch.save"),
        ("x.pth", zipped(pickle.dumps({"a": 1})), "no tensors by name"),
        ("x.pth", zipped(b"", compression=zipfile.ZIP_DEFLATED), "compressed"),
        ("x.pth", LEGACY[:-20], "beyond its storage|buffer size"),
        ("x.safetensors", LEGACY, "not a safetensors file"),
    ],
)
def test_damage_is_one_line(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=words):
        state_dict.load(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        state_dict.load(tmp_path / "x.pth")
