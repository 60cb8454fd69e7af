"""The official archives: all four layouts exact, every damage named, and no pickle that runs."""

import bz2
import gzip
import io
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from keras_cifar import data
from keras_cifar.core.errors import UserError
from keras_cifar.data import archive
from keras_cifar.data.images import resize_images

TEN = ("airplane", "automobile", "bird")
HUNDRED = ("apple", "aquarium_fish", "baby", "bear")
FOLDERS = {
    "cifar-10-python": "cifar-10-batches-py",
    "cifar-10-binary": "cifar-10-batches-bin",
    "cifar-100-python": "cifar-100-python",
    "cifar-100-binary": "cifar-100-binary",
}
PER_BATCH = 4


def examples(kind: str) -> tuple:
    """(train pixels, train labels, test pixels, test labels): uint8 [N, 32, 32, 3] and int64."""
    random = np.random.default_rng(len(kind))
    count = 5 * PER_BATCH if "cifar-10-" in kind else 2 * PER_BATCH
    classes = len(names_of(kind))
    pixels = random.integers(0, 256, (count + PER_BATCH, 32, 32, 3), np.uint8)
    labels = np.arange(len(pixels)) % classes
    return pixels[:count], labels[:count], pixels[count:], labels[count:]


def names_of(kind: str) -> tuple:
    return TEN if "cifar-10-" in kind else HUNDRED


def planes(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 3072]: all red, then all green, then all blue."""
    return np.concatenate([pixels[..., c].reshape(len(pixels), 1024) for c in range(3)], axis=1)


def dump(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


def members_of(kind: str) -> dict[str, bytes]:
    """The files of a small archive, as the official ones are written."""
    train, train_labels, test, test_labels = examples(kind)
    ten, python = "cifar-10-" in kind, kind.endswith("python")
    if ten:
        parts = [
            (f"data_batch_{i + 1}", slice(i * PER_BATCH, (i + 1) * PER_BATCH)) for i in range(5)
        ]
    else:
        parts = [("train", slice(None))]
    batches = [(name, train[part], train_labels[part]) for name, part in parts]
    batches.append(("test_batch" if ten else "test", test, test_labels))
    if not python:
        members = {f"{n}.bin": records(pixels, labels, ten) for n, pixels, labels in batches}
        names = "".join(f"{name}\n" for name in names_of(kind)).encode()
        # The original has an empty line at the end.
        members["batches.meta.txt" if ten else "fine_label_names.txt"] = names + b"\n"
        if not ten:
            members["coarse_label_names.txt"] = b"aquatic_mammals\nfish\n"
        return members
    members = {name: dump(batch(name, pixels, labels, ten)) for name, pixels, labels in batches}
    names = [name.encode() for name in names_of(kind)]
    if ten:
        members["batches.meta"] = dump(
            {b"num_cases_per_batch": PER_BATCH, b"label_names": names, b"num_vis": 3072}
        )
    else:
        members["meta"] = dump({b"fine_label_names": names, b"coarse_label_names": [b"fish"]})
    return members


def batch(name: str, pixels: np.ndarray, labels: np.ndarray, ten: bool) -> dict:
    common = {b"batch_label": name.encode(), b"data": planes(pixels), b"filenames": [b"a.png"]}
    labels = [int(label) for label in labels]
    if ten:
        return common | {b"labels": labels}
    return common | {b"fine_labels": labels, b"coarse_labels": [9] * len(labels)}


def records(pixels: np.ndarray, labels: np.ndarray, ten: bool) -> bytes:
    columns = [labels[:, None].astype(np.uint8), planes(pixels)]
    if not ten:
        columns.insert(0, np.full((len(labels), 1), 9, np.uint8))  # the coarse label
    return np.concatenate(columns, axis=1).tobytes()


def pack(path: pathlib.Path, kind: str, members: dict[str, bytes], mode: str = "w:gz"):
    """Writes `members` below the folder that the original archive has."""
    with tarfile.open(path, mode) as tar:
        folder = tarfile.TarInfo(FOLDERS[kind])
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, contents in (members | {"readme.html": b"<html>"}).items():
            info = tarfile.TarInfo(f"{FOLDERS[kind]}/{name}")
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def unpack(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    path.mkdir(parents=True)
    for name, contents in members.items():
        (path / name).write_bytes(contents)
    return path


def store(tmp_path: pathlib.Path, kind: str, members: dict, pack_it: bool) -> pathlib.Path:
    if pack_it:
        return pack(tmp_path / "a.tar.gz", kind, members)
    return unpack(tmp_path / "a", members)


def refusal(path: pathlib.Path) -> str:
    """The message of the UserError that loading `path` raises: always one line."""
    with pytest.raises(UserError) as caught:
        data.load(f"archive:{path}", val_fraction=0)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ---- Layouts


def packed(tmp_path, kind):
    return pack(tmp_path / f"{kind}.tar.gz", kind, members_of(kind))


def packed_without_compression(tmp_path, kind):
    return pack(tmp_path / f"{kind}.tar", kind, members_of(kind), mode="w")


def unpacked(tmp_path, kind):
    return unpack(tmp_path / "anything", members_of(kind))


def unpacked_below(tmp_path, kind):
    return unpack(tmp_path / FOLDERS[kind], members_of(kind)).parent


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("form", [packed, packed_without_compression, unpacked, unpacked_below])
def test_pixels_labels_and_names_come_back_exact(tmp_path, kind, form):
    dataset = data.load(f"archive:{form(tmp_path, kind)}", val_fraction=0)
    train, train_labels, test, test_labels = examples(kind)
    np.testing.assert_array_equal(dataset.train.images, train)
    np.testing.assert_array_equal(dataset.train.labels, train_labels)
    np.testing.assert_array_equal(dataset.test.images, test)
    np.testing.assert_array_equal(dataset.test.labels, test_labels)
    assert dataset.class_names == names_of(kind)
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int64


def python2(text: bytes) -> bytes:
    """A pickled `str` of Python 2, with which the originals were written."""
    return b"U" + bytes([len(text)]) + text


def test_pickles_that_python_2_wrote_are_read(tmp_path):
    members = members_of("cifar-10-python")
    names = b"".join(python2(name.encode()) for name in TEN)
    # {'label_names': [...]}, as Python 2's cPickle with protocol 2 spells it.
    members["batches.meta"] = b"\x80\x02}" + python2(b"label_names") + b"](" + names + b"es."
    for name in ("data_batch_1", "test_batch"):
        pixels, labels = examples("cifar-10-python")[:2]
        pixels, labels = pixels[:PER_BATCH], labels[:PER_BATCH]
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n"
            b"(cnumpy\nndarray\n(K\x00t" + python2(b"b") + b"tR"
            b"(K\x01(K\x04M\x00\x0ctcnumpy\ndtype\n("
            + python2(b"u1")
            + b"K\x00K\x01tR(K\x03"
            + python2(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + (PER_BATCH * archive.PIXELS).to_bytes(4, "little")
            + planes(pixels).tobytes()
            + b"tb"
        )
        numbers = b"".join(b"K" + bytes([label]) for label in labels)
        members[name] = (
            b"\x80\x02}(" + python2(b"data") + array + python2(b"labels") + b"](" + numbers + b"eu."
        )
    path = pack(tmp_path / "a.tar.gz", "cifar-10-python", members)
    dataset = data.load(f"archive:{path}", val_fraction=0)
    assert dataset.class_names == TEN
    np.testing.assert_array_equal(dataset.test.images, pixels)
    np.testing.assert_array_equal(dataset.test.labels, labels)


def test_nothing_is_written_beside_a_packed_archive(tmp_path):
    data.load(f"archive:{packed(tmp_path, 'cifar-10-python')}", val_fraction=0)
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("side", [8, 48])
def test_image_size_resizes(tmp_path, side):
    path = unpacked(tmp_path, "cifar-10-binary")
    dataset = data.load(f"archive:{path}", image_size=side, val_fraction=0)
    expected = resize_images(examples("cifar-10-binary")[0], (side, side))
    np.testing.assert_array_equal(dataset.train.images, expected)
    assert dataset.test.images.shape[1:] == (side, side, 3)


def test_image_size_32_changes_nothing(tmp_path):
    path = unpacked(tmp_path, "cifar-10-binary")
    dataset = data.load(f"archive:{path}", image_size=32, val_fraction=0)
    np.testing.assert_array_equal(dataset.train.images, examples("cifar-10-binary")[0])


# ---- Damaged archives


def test_a_missing_archive_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.tar.gz")


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_truncated_archive_is_refused(tmp_path, kind, keep):
    path = packed(tmp_path, kind)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents))])
    message = refusal(path)
    assert "download it again" in message
    assert any(name in message for name in (*members_of(kind), "first member"))


def test_a_truncated_archive_without_compression_is_refused(tmp_path):
    path = packed_without_compression(tmp_path, "cifar-10-binary")
    path.write_bytes(path.read_bytes()[:20_000])
    assert "data_batch_2.bin" in refusal(path)


def test_an_archive_with_damaged_bytes_is_refused(tmp_path):
    path = packed(tmp_path, "cifar-10-python")
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 3000] = bytes(3000)
    path.write_bytes(contents)
    assert "download it again" in refusal(path)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"not an archive",
        b"<html>404 Not Found</html>" * 100,
        gzip.compress(b"no tar in it" * 1000),
        bz2.compress(b"no tar in it" * 1000),
    ],
    ids=["empty", "text", "html", "gzip", "bzip2"],
)
def test_what_is_no_archive_is_refused(tmp_path, contents):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(contents)
    message = refusal(path)
    assert ":;" not in message  # a reason that ends before it says anything


@pytest.mark.parametrize("pack_it", [True, False])
def test_an_archive_of_something_else_names_the_four(tmp_path, pack_it):
    members = {"mnist.txt": b"x"}
    path = store(tmp_path, "cifar-10-python", members, pack_it)
    message = refusal(path)
    for kind in FOLDERS:
        assert kind in message


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("cifar-10-python", "data_batch_3"),
        ("cifar-10-python", "test_batch"),
        ("cifar-10-python", "batches.meta"),
        ("cifar-10-binary", "data_batch_5.bin"),
        ("cifar-10-binary", "batches.meta.txt"),
        ("cifar-100-python", "train"),
        ("cifar-100-python", "test"),
        ("cifar-100-python", "meta"),
        ("cifar-100-binary", "test.bin"),
        ("cifar-100-binary", "fine_label_names.txt"),
    ],
)
@pytest.mark.parametrize("pack_it", [True, False])
def test_a_missing_member_is_named(tmp_path, kind, member, pack_it):
    members = members_of(kind)
    del members[member]
    path = store(tmp_path, kind, members, pack_it)
    assert f"lacks {member}" in refusal(path)


def changed(tmp_path, kind: str, member: str, contents: bytes) -> str:
    """What is said about an archive of which one member was replaced; it must name it."""
    path = pack(tmp_path / "a.tar.gz", kind, members_of(kind) | {member: contents})
    message = refusal(path)
    assert member in message
    return message


def changed_batch(tmp_path, kind: str, member: str, **changes) -> str:
    value = pickle.loads(members_of(kind)[member])
    value |= {key.encode(): change for key, change in changes.items()}
    return changed(tmp_path, kind, member, dump({k: v for k, v in value.items() if v is not None}))


@pytest.mark.parametrize(
    ("kind", "member", "record"),
    [("cifar-10-binary", "data_batch_2.bin", 3073), ("cifar-100-binary", "test.bin", 3074)],
)
@pytest.mark.parametrize("cut", [1, 1000, None])
def test_a_part_of_a_record_is_refused(tmp_path, kind, member, record, cut):
    contents = members_of(kind)[member][:-cut] if cut else b""
    assert f"{record}-byte records" in changed(tmp_path, kind, member, contents)


def test_a_binary_batch_shorter_than_the_others_is_refused(tmp_path):
    contents = members_of("cifar-10-binary")["data_batch_4.bin"][3073:]
    message = changed(tmp_path, "cifar-10-binary", "data_batch_4.bin", contents)
    assert "3 images instead of 4" in message


def test_a_python_batch_shorter_than_the_others_is_refused(tmp_path):
    pixels, labels = (part[:2] for part in examples("cifar-10-python")[:2])
    contents = dump(batch("x", pixels, labels, ten=True))
    message = changed(tmp_path, "cifar-10-python", "data_batch_5", contents)
    assert "2 images instead of 4" in message


def test_a_member_shorter_than_the_official_one_is_refused(tmp_path):
    official = [layout.images for layout in archive.LAYOUTS]
    assert official == [(10_000, 10_000)] * 2 + [(50_000, 10_000)] * 2
    path = tmp_path / "a"
    members = members_of("cifar-100-binary")
    # 10,000 test images and a train that lost records.
    members["test.bin"] = members["test.bin"][:3074] * 10_000
    message = refusal(unpack(path, members))
    assert "train.bin has 8 images instead of 50000" in message


@pytest.mark.parametrize("label", [3, 255])
def test_a_binary_label_out_of_range_is_refused(tmp_path, label):
    contents = bytearray(members_of("cifar-10-binary")["test_batch.bin"])
    contents[3073] = label
    message = changed(tmp_path, "cifar-10-binary", "test_batch.bin", bytes(contents))
    assert "label outside 0 ... 2" in message


@pytest.mark.parametrize("label", [-1, 3, 2**70])
def test_a_python_label_out_of_range_is_refused(tmp_path, label):
    labels = [0, 1, label, 2]
    message = changed_batch(tmp_path, "cifar-10-python", "data_batch_1", labels=labels)
    assert "label" in message


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2],
        [0, 1, 2, 0, 1],
        [0.0, 1.0, 2.0, 0.0],
        [b"0"] * 4,
        [[0]] * 4,
        [[0], [0, 1]],
        7,
        None,
    ],
)
def test_labels_of_another_form_are_refused(tmp_path, labels):
    assert "label" in changed_batch(tmp_path, "cifar-10-python", "data_batch_1", labels=labels)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 3071), np.uint8),
        np.zeros((4, 32, 32, 3), np.uint8),
        np.zeros(4 * 3072, np.uint8),
        np.zeros((0, 3072), np.uint8),
        np.zeros((4, 3072), np.float32),
        [[1, 2], [3]],
        b"12",
        None,
    ],
    ids=["width", "rank4", "rank1", "none", "float", "ragged", "bytes", "lacking"],
)
def test_data_of_another_form_is_refused(tmp_path, pixels):
    assert "data" in changed_batch(tmp_path, "cifar-10-python", "data_batch_1", data=pixels)


@pytest.mark.parametrize("value", [[1, 2], b"text", None, 3])
def test_a_member_that_is_no_dictionary_is_refused(tmp_path, value):
    assert "dict" in changed(tmp_path, "cifar-100-python", "train", dump(value))


@pytest.mark.parametrize(
    "contents", [b"", b"\x80", b"garbage", b"\x80\x02}", b"\x80\x63x", b"L1\n", bytes(100)]
)
def test_a_damaged_pickle_is_refused(tmp_path, contents):
    changed(tmp_path, "cifar-10-python", "test_batch", contents)
    changed_names = members_of("cifar-10-python") | {"batches.meta": contents}
    assert "batches.meta" in refusal(pack(tmp_path / "b.tar.gz", "cifar-10-python", changed_names))


@pytest.mark.parametrize("cut", [10, 1000, 5000])
def test_a_truncated_pickle_is_refused(tmp_path, cut):
    contents = members_of("cifar-10-python")["data_batch_2"][:-cut]
    changed(tmp_path, "cifar-10-python", "data_batch_2", contents)


@pytest.mark.parametrize(
    "names", [[], [b"cat", b"cat"], [1, 2, 3], 7, [b"\xff\xfe"], ["cat", "dog", "x"], None]
)
def test_class_names_of_another_form_are_refused(tmp_path, names):
    value = {} if names is None else {b"label_names": names}
    path = pack(
        tmp_path / "a.tar.gz",
        "cifar-10-python",
        members_of("cifar-10-python") | {"batches.meta": dump(value)},
    )
    assert "batches.meta" in refusal(path)


@pytest.mark.parametrize("contents", [b"", b"\n \n", b"cat\ncat\n", b"\xff\xfe\n"])
def test_a_list_of_class_names_that_is_damaged_is_refused(tmp_path, contents):
    changed(tmp_path, "cifar-10-binary", "batches.meta.txt", contents)


@pytest.mark.parametrize("pack_it", [True, False])
def test_a_member_that_is_too_large_is_not_read(tmp_path, monkeypatch, pack_it):
    monkeypatch.setattr(archive, "MAX_MEMBER", 10_000)
    members = members_of("cifar-10-binary")
    path = store(tmp_path, "cifar-10-binary", members, pack_it)
    assert "too large" in refusal(path)


# ---- Pickles that would do something


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("member", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_pickle_that_would_run_a_command_is_refused_and_nothing_runs(tmp_path, member):
    made = tmp_path / "made"
    contents = dump({b"data": Call(os.system, f"touch '{made}'")})
    message = changed(tmp_path, "cifar-10-python", member, contents)
    assert f"{os.system.__module__}.system" in message
    assert not made.exists()
    pickle.loads(contents)  # It is a real one: an ordinary reader runs it.
    assert made.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("open(PATH, 'w')",)),
        (exec, ("open(PATH, 'w')",)),
        (open, ("PATH", "w")),
        (getattr, ("", "join")),
        (shutil.rmtree, ("PATH",)),
        (np.load, ("PATH",)),
        (np.memmap, ("PATH", np.dtype("u1"), "w+", 0, 4)),
        (pickle.loads, (b"N.",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pickle_that_names_a_function_is_refused(tmp_path, function, arguments):
    made = tmp_path / "made"
    arguments = [
        a.replace("PATH", repr(str(made)) if "(" in a else str(made)) if isinstance(a, str) else a
        for a in arguments
    ]
    contents = dump({b"data": Call(function, *arguments)})
    message = changed(tmp_path, "cifar-10-python", "data_batch_1", contents)
    assert function.__name__ in message
    assert not made.exists()


def nested(count: int, between: bytes = b"", before: bytes = b"") -> bytes:
    """A tuple in a tuple ... as a dictionary's key: hashing it overflows the C stack."""
    return b"\x80\x02}" + before + b")" + (b"\x85" + between) * count + b"Ns."


def shared(depth: int) -> bytes:
    """A list of ten times a list of ten times ...: 10^depth numbers to whoever walks through it."""
    value = 0
    for _ in range(depth):
        value = [value] * 10
    return dump({b"data": value, b"labels": value})


def array(shape: tuple, contents: bytes = b"", text: str = "u1") -> bytes:
    """A batch whose data have a pickled array's form and claim a shape."""
    real = pickle.dumps(np.zeros(0, np.uint8), 2)
    function, (kind, *rest), state = np.zeros(0, np.uint8).__reduce__()
    assert pickle.loads(real).shape == (0,)

    class Array:
        def __reduce__(self):
            return function, (kind, *rest), (state[0], shape, np.dtype(text), False, contents)

    return dump({b"data": Array(), b"labels": [0]})


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (dump({b"data": Call(np.ndarray, (2**40, 3072), np.dtype("u1"))}), "numpy.ndarray"),
        (dump({b"data": Call(np.ndarray, (2**20, 3072), np.dtype("u1"))}), "numpy.ndarray"),
        (array((2**40, 3072), b"x"), "reshape"),
        (array((1, 3072), bytes(3072), "S1"), "array of numbers"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "more memory"),  # LONG_BINPUT of a place of 16 GB
        (b"\x80\x05\x96" + b"\0\0\0\0\2\0\0\0" + b".", "expected 8589934592"),  # BYTEARRAY8
        (b"\x80\x05\x96" + (4).to_bytes(8, "little") + b"abcd.", "BYTEARRAY8"),
        (b"\x80\x02" + b"]" * 1_000_002 + b".", "more memory"),
        (nested(200_000), "more memory"),
        (nested(200_000, b"q\0"), "more memory"),
        (nested(100_000, b"0h\0h\1R"), "POP"),
        (nested(100_000, before=b"cnumpy\ndtype\nq\0)q\1", between=b"h\0h\1Ra"), "more memory"),
        (shared(9), "a list of integers"),
        (dump({b"data": np.zeros((1, 3072), np.uint8)})[:-1] + b"0" * 9, "POP"),
    ],
    ids=["ndarray", "smaller", "shape", "text", "memo", "claim", "bytearray", "lists", "nested",
         "memoized", "called", "calling", "shared", "pop"],
)  # fmt: skip
def test_a_pickle_that_asks_for_memory_is_refused(tmp_path, contents, why):
    assert why in changed(tmp_path, "cifar-10-python", "data_batch_1", contents)


def test_a_text_that_is_encoded_again_and_again_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBER", 100_000)
    text = b"X" + (50_000).to_bytes(4, "little") + b"x" * 50_000 + b"q\0"
    call = b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R"
    twice, thrice = (b"\x80\x02](" + text + call * n + b"e." for n in (2, 3))
    assert "dict" in changed(tmp_path, "cifar-10-python", "data_batch_1", twice)
    assert "more memory" in changed(tmp_path, "cifar-10-python", "data_batch_1", thrice)


# ---- Archives that would do something


def with_member(tmp_path, name="x", kind=tarfile.REGTYPE, target="", size=0, first=True):
    """A CIFAR-10 archive with one member more."""
    path = tmp_path / "a.tar.gz"
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    whole = pack(tmp_path / "whole.tar", "cifar-10-binary", members_of("cifar-10-binary"), "w")
    with tarfile.open(path, "w:gz") as tar, tarfile.open(whole) as old:
        if first:
            tar.addfile(info, io.BytesIO(bytes(size)))
        for member in old:
            tar.addfile(member, old.extractfile(member) if member.isfile() else None)
        if not first:
            tar.addfile(info, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("member", "why"),
    [
        ({"name": "../test_batch.bin"}, "outside"),
        ({"name": "a/../../b"}, "outside"),
        ({"name": "/tmp/data_batch_1.bin"}, "outside"),
        ({"name": "l", "kind": tarfile.SYMTYPE, "target": "/etc/passwd"}, "a link or a device"),
        ({"name": "l", "kind": tarfile.LNKTYPE, "target": "../x"}, "a link or a device"),
        ({"name": "d", "kind": tarfile.CHRTYPE}, "a link or a device"),
        ({"name": "d", "kind": tarfile.FIFOTYPE}, "a link or a device"),
        ({"name": "x/data_batch_1.bin"}, "twice"),
    ],
)
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path, member, why, first):
    path = with_member(tmp_path, **member, first=first)
    before = sorted(p.name for p in tmp_path.iterdir())
    message = refusal(path)
    assert why in message
    assert member["name"] in message or why == "twice"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_in_an_archive_and_a_harmless_file_are_taken(tmp_path):
    for member in ({"name": "./x", "kind": tarfile.DIRTYPE}, {"name": "./notes..txt", "size": 9}):
        assert len(data.load(f"archive:{with_member(tmp_path, **member)}").test) == PER_BATCH


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])  # pax, global pax, GNU's long names
@pytest.mark.parametrize("size", [2**40, 2**28])
def test_a_header_that_claims_a_huge_name_is_not_read(tmp_path, kind, size):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    assert "unpacks to more than" in refusal(path)


def test_a_sparse_member_that_claims_to_be_small_is_not_skipped(tmp_path):
    """GNU's header has a size in the archive and another one, of which tarfile tells."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 2**40
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000000001\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + bytes(10_000))
    assert "unpacks to more than" in refusal(path)


def test_nothing_is_unpacked_to_be_skipped_beyond_the_limit():
    zeros = archive._Bounded(io.BytesIO(bytes(1000)))
    assert zeros.seek(900) == 900
    with pytest.raises(tarfile.ReadError, match="unpacks to more than"):
        zeros.seek(archive.MAX_ARCHIVE + 1)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = with_member(tmp_path, size=1_000_000)
    assert len(data.load(f"archive:{path}").test) == PER_BATCH
    monkeypatch.setattr(archive, "MAX_ARCHIVE", 900_000)
    assert "unpacks to more than 900,000 bytes" in refusal(path)


def test_an_archive_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    path = packed(tmp_path, "cifar-10-python")
    assert "more than 5 members" in refusal(path)


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "a.tar.gz")
    assert "a pipe or a device" in refusal(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("name", ["cat\ndog", "\x1b[31m", " ", "a\u2028b"])
def test_class_names_that_are_no_line_of_text_are_refused(tmp_path, name):
    value = {b"label_names": [b"x", b"y", name.encode()]}
    changed_names = members_of("cifar-10-python") | {"batches.meta": dump(value)}
    path = pack(tmp_path / "a.tar.gz", "cifar-10-python", changed_names)
    assert "must be printable text" in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_locked_archive_is_named(tmp_path):
    path = packed(tmp_path, "cifar-10-python")
    path.chmod(0)
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("form", [packed, unpacked])
def test_an_archive_that_the_system_refuses_is_named(tmp_path, form, monkeypatch):
    path = form(tmp_path, "cifar-10-python")

    def refuse(where, *args, **options):
        raise PermissionError(13, "Permission denied", str(where))

    monkeypatch.setattr(archive, "open_file", refuse)
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    assert "Permission denied" in refusal(path)
