"""Files are read whole, within a limit, and without memory that they do not need."""

import io
import tracemalloc

import pytest

from keras_cifar.core import files


class Raw(io.FileIO):
    """A file of a network file system: a read returns at most 7 bytes. `grow` is called before each."""

    grow = staticmethod(lambda: None)

    def read(self, size=-1):
        self.grow()
        return super().read(min(size, 7))


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setattr(files, "open_file", Raw)
    return Raw


def test_a_file_whose_reads_come_short_is_read_whole(raw, tmp_path):
    contents = bytes(range(100))
    (tmp_path / "a").write_bytes(contents)
    assert files.read(tmp_path / "a", 100) == contents


def test_a_file_that_grows_is_read_to_its_end_and_not_past_the_limit(raw, monkeypatch, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(raw, "grow", lambda self: path.stat().st_size < 30 and append(path))
    assert len(files.read(path, 30)) == 30
    monkeypatch.setattr(raw, "grow", lambda self: append(path))
    with pytest.raises(OSError, match="larger than 60 bytes"):
        files.read(path, 60)


def append(path) -> None:
    with open(path, "ab") as file:
        file.write(b"0123456789")


@pytest.mark.parametrize("size", [0, 1000, files.READ_BLOCK, 3 * files.READ_BLOCK + 1])
def test_the_memory_is_that_of_the_file_and_not_of_the_limit(tmp_path, size):
    (tmp_path / "a").write_bytes(bytes(size))
    tracemalloc.start()
    try:
        contents = files.read(tmp_path / "a", 2**29)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(contents) == size
    assert peak < size + 4 * files.READ_BLOCK
