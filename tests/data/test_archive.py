"""The official archives: all four layouts exact, every damage named, and no pickle that runs."""

import bz2
import functools
import gzip
import io
import os
import pathlib
import pickle
import shutil
import tarfile
import tracemalloc
import types

import numpy as np
import pytest

from keras_cifar import data
from keras_cifar.core import pickles
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
    pixels = random.integers(0, 256, (count + PER_BATCH, 32, 32, 3), np.uint8)
    labels = np.arange(len(pixels)) % len(names_of(kind))
    return pixels[:count], labels[:count], pixels[count:], labels[count:]


def names_of(kind: str) -> tuple:
    return TEN if "cifar-10-" in kind else HUNDRED


def planes(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 3072]: all red, then all green, then all blue."""
    return np.concatenate([pixels[..., c].reshape(len(pixels), 1024) for c in range(3)], axis=1)


def dump(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


@functools.cache
def members_of(kind: str) -> types.MappingProxyType[str, bytes]:
    """The files of a small archive, as the official ones are written."""
    train, train_labels, test, test_labels = examples(kind)
    ten = "cifar-10-" in kind
    size = PER_BATCH if ten else len(train)
    batches = [
        (f"data_batch_{start // size + 1}" if ten else "train", train[start : start + size],
         train_labels[start : start + size])
        for start in range(0, len(train), size)
    ]  # fmt: skip
    batches.append(("test_batch" if ten else "test", test, test_labels))
    names = [name.encode() for name in names_of(kind)]
    if kind.endswith("python"):
        members = {name: dump(batch(name, pixels, labels, ten)) for name, pixels, labels in batches}
        if ten:
            about = {b"num_cases_per_batch": PER_BATCH, b"label_names": names, b"num_vis": 3072}
            members["batches.meta"] = dump(about)
        else:
            members["meta"] = dump({b"fine_label_names": names, b"coarse_label_names": [b"fish"]})
    else:
        members = {f"{n}.bin": records(pixels, labels, ten) for n, pixels, labels in batches}
        # The original has an empty line at the end.
        file = "batches.meta.txt" if ten else "fine_label_names.txt"
        members[file] = b"\n".join([*names, b"", b""])
    return types.MappingProxyType(members)


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


def packed(tmp_path, kind, suffix=".tar.gz"):
    mode = "w:gz" if suffix == ".tar.gz" else "w"
    return pack(tmp_path / f"{kind}{suffix}", kind, members_of(kind), mode)


FORMS = {
    "packed": packed,
    "packed without compression": functools.partial(packed, suffix=".tar"),
    "unpacked": lambda tmp_path, kind: unpack(tmp_path / "anything", members_of(kind)),
    "unpacked below": lambda tmp_path, kind: unpack(tmp_path / "a/b", members_of(kind)).parent,
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("form", FORMS)
def test_pixels_labels_and_names_come_back_exact(tmp_path, kind, form):
    path = FORMS[form](tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    dataset = data.load(f"archive:{path}", val_fraction=0)
    assert sorted(tmp_path.iterdir()) == before
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
    members = dict(members_of("cifar-10-python"))
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


@pytest.mark.parametrize(
    ("image_size", "size", "rule"),
    [
        (8, (8, 8), "stretch"),
        (48, (48, 48), "stretch"),
        ("8x12", (8, 12), "stretch"),
        (32, (32, 32), "crop"),
    ],
)
def test_image_size_resizes(tmp_path, image_size, size, rule):
    path = packed(tmp_path, "cifar-10-binary")
    dataset = data.load(f"archive:{path}", image_size=image_size, val_fraction=0, resize=rule)
    pixels = examples("cifar-10-binary")[0]
    np.testing.assert_array_equal(dataset.train.images, resize_images(pixels, size, rule))
    assert dataset.test.images.shape[1:] == (*size, 3)
    # At their own size CIFAR's images are zoomed by an explicit crop alone.
    own = data.load(f"archive:{path}", image_size=32, val_fraction=0).train.images
    np.testing.assert_array_equal(own, pixels)
    assert rule == "stretch" or (own != dataset.train.images).any()


# ---- Damaged archives


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_truncated_archive(tmp_path, kind, keep):
    path = packed(tmp_path, kind)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents))])
    message = refusal(path)
    assert "download it again" in message
    assert any(name in message for name in (*members_of(kind), "first member"))


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"<html>404 Not Found</html>" * 100,
        gzip.compress(b"no tar in it" * 1000),
        bz2.compress(b"no tar in it" * 1000),
    ],
    ids=["empty", "html", "gzip", "bzip2"],
)
def test_file_that_is_no_archive(tmp_path, contents):
    path = tmp_path / "cifar-10-python.tar.gz"
    assert "does not exist" in refusal(path)
    path.write_bytes(contents)
    assert ":;" not in refusal(path)  # a reason that ends before it says anything


@pytest.mark.parametrize("pack_it", [True, False])
def test_archive_of_something_else_names_the_four(tmp_path, pack_it):
    message = refusal(store(tmp_path, "cifar-10-python", {"mnist.txt": b"x"}, pack_it))
    for kind in FOLDERS:
        assert kind in message


@pytest.mark.parametrize("layout", archive.LAYOUTS, ids=FOLDERS)
@pytest.mark.parametrize("pack_it", [True, False])
def test_missing_member_is_named(tmp_path, layout, pack_it):
    (kind,) = (kind for kind in FOLDERS if set(layout.members) <= set(members_of(kind)))
    for number, member in enumerate(layout.members):
        members = {name: c for name, c in members_of(kind).items() if name != member}
        (tmp_path / str(number)).mkdir()
        path = store(tmp_path / str(number), kind, members, pack_it)
        assert f"lacks {member}" in refusal(path)


def changed(tmp_path, kind: str, member: str, contents: bytes) -> str:
    """What is said about an archive of which one member was replaced; it must name it."""
    path = pack(tmp_path / "a.tar", kind, members_of(kind) | {member: contents}, "w")
    message = refusal(path)
    assert member in message
    return message


def changed_batch(tmp_path, **changes) -> str:
    """What is said about a python archive with other values in a batch; None removes one."""
    value = pickle.loads(members_of("cifar-10-python")["data_batch_1"])
    value |= {key.encode(): change for key, change in changes.items()}
    contents = dump({k: v for k, v in value.items() if v is not None})
    return changed(tmp_path, "cifar-10-python", "data_batch_1", contents)


@pytest.mark.parametrize(
    ("kind", "member", "record"),
    [("cifar-10-binary", "data_batch_2.bin", 3073), ("cifar-100-binary", "test.bin", 3074)],
)
def test_incomplete_record(tmp_path, kind, member, record):
    contents = members_of(kind)[member]
    for damaged in (contents[:-1], contents[:-1000], b""):
        assert f"{record}-byte records" in changed(tmp_path, kind, member, damaged)


def test_batch_shorter_than_the_others(tmp_path):
    contents = members_of("cifar-10-binary")["data_batch_4.bin"][3073:]
    message = changed(tmp_path, "cifar-10-binary", "data_batch_4.bin", contents)
    assert "3 images instead of 4" in message
    pixels, labels = (part[:2] for part in examples("cifar-10-python")[:2])
    contents = dump(batch("x", pixels, labels, ten=True))
    message = changed(tmp_path, "cifar-10-python", "data_batch_5", contents)
    assert "2 images instead of 4" in message


def test_member_shorter_than_the_official_one(tmp_path):
    official = [layout.images for layout in archive.LAYOUTS]
    assert official == [(10_000, 10_000)] * 2 + [(50_000, 10_000)] * 2
    members = dict(members_of("cifar-100-binary"))
    # 10,000 test images and a train that lost records.
    members["test.bin"] = members["test.bin"][:3074] * 10_000
    message = refusal(unpack(tmp_path / "a", members))
    assert "train.bin has 8 images instead of 50000" in message


def test_binary_label_out_of_range(tmp_path):
    contents = bytearray(members_of("cifar-10-binary")["test_batch.bin"])
    for contents[3073] in (3, 255):
        message = changed(tmp_path, "cifar-10-binary", "test_batch.bin", bytes(contents))
        assert "label outside 0 ... 2" in message


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([0, 1, -1, 2], "label outside 0 ... 2"),
        ([0, 1, 3, 2], "label outside 0 ... 2"),
        ([0, 1, 2**70, 2], "int"),
        ([0, 1, 2], "not as many integer labels"),
        (np.array([0.0, 1.0, 2.0, 0.0]), "not as many integer labels"),
        ([0.0, 1.0, 2.0, 0.0], "a list of integers"),
        ([[0], [0, 1]], "a list of integers"),
        (7, "a list of integers"),
        (None, "data and labels"),
    ],
)
def test_invalid_labels(tmp_path, labels, why):
    assert why in changed_batch(tmp_path, labels=labels)


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (np.zeros((4, 3071), np.uint8), "uint8 [4, 3071]"),
        (np.zeros((4, 32, 32, 3), np.uint8), "uint8 [4, 32, 32, 3]"),
        (np.zeros(4 * 3072, np.uint8), "uint8 [12288]"),
        (np.zeros((4, 3072), np.float32), "float32 [4, 3072]"),
        (b"12", "a list of integers or an array"),
        (None, "data and labels"),
    ],
    ids=["width", "rank4", "rank1", "float", "bytes", "lacking"],
)
def test_invalid_data(tmp_path, pixels, why):
    assert why in changed_batch(tmp_path, data=pixels)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1"])
def test_labels_may_be_an_array(tmp_path, dtype):
    members = dict(members_of("cifar-10-python"))
    value = pickle.loads(members["test_batch"])
    members["test_batch"] = dump(value | {b"labels": np.array(value[b"labels"], dtype)})
    path = unpack(tmp_path / "a", members)
    assert data.load(f"archive:{path}").test.labels.tolist() == value[b"labels"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_protocols(tmp_path, protocol):
    members = {
        name: pickle.dumps(pickle.loads(contents), protocol)
        for name, contents in members_of("cifar-100-python").items()
    }
    dataset = data.load(f"archive:{unpack(tmp_path / 'a', members)}", val_fraction=0)
    train, labels = examples("cifar-100-python")[:2]
    np.testing.assert_array_equal(dataset.train.images, train)
    np.testing.assert_array_equal(dataset.train.labels, labels)


WHOLE = members_of("cifar-10-python")["data_batch_2"]


@pytest.mark.parametrize(
    "contents",
    [
        *(b"", b"\x80", b"garbage", b"\x80\x02}", b"\x80\x63x", b"L1\n", b"\x80\x02.", bytes(100)),
        *(WHOLE[:-cut] for cut in (1, 10, 5000)),
        *(dump(value) for value in ([1, 2], b"text", None, 3)),
    ],
    ids=str,
)
def test_damaged_pickle(tmp_path, contents):
    for member in ("data_batch_2", "batches.meta"):
        changed(tmp_path, "cifar-10-python", member, contents)


@pytest.mark.parametrize(
    "names", [[], [b"cat", b"cat"], [1, 2, 3], 7, [b"\xff\xfe"], [[b"cat"]], {b"cat": 1}, None]
)
def test_invalid_class_names(tmp_path, names):
    value = {} if names is None else {b"label_names": names}
    changed(tmp_path, "cifar-10-python", "batches.meta", dump(value))


@pytest.mark.parametrize("contents", [b"", b"\n \n", b"cat\ncat\n", b"\xff\xfe\n"])
def test_invalid_list_of_class_names(tmp_path, contents):
    changed(tmp_path, "cifar-10-binary", "batches.meta.txt", contents)


@pytest.mark.parametrize("name", ["cat\ndog", "\x1b[31m", " ", "a\u2028b"])
def test_class_names_that_are_no_line_of_text(tmp_path, name):
    contents = dump({b"label_names": [b"x", b"y", name.encode()]})
    members = members_of("cifar-10-python") | {"batches.meta": contents}
    assert "must be printable text" in refusal(unpack(tmp_path / "a", members))


@pytest.mark.parametrize("pack_it", [True, False])
def test_member_that_is_too_large_is_not_read(tmp_path, monkeypatch, pack_it):
    monkeypatch.setattr(archive, "MAX_MEMBER", 10_000)
    path = store(tmp_path, "cifar-10-binary", members_of("cifar-10-binary"), pack_it)
    assert "too large" in refusal(path)


@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_archive_that_the_system_refuses_is_named(tmp_path, form, monkeypatch):
    path = FORMS[form](tmp_path, "cifar-10-python")

    def refuse(where, *args, **options):
        raise PermissionError(13, "Permission denied", str(where))

    monkeypatch.setattr(archive, "open_file", refuse)
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    assert "Permission denied" in refusal(path)


# ---- Pickles that would do something


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("member", ["data_batch_1", "test_batch", "batches.meta"])
def test_pickle_that_would_run_a_command_is_refused_and_nothing_runs(tmp_path, member):
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
        (eval, ("open('made', 'w')",)),
        (open, ("made", "w")),
        (getattr, ("", "join")),
        (shutil.rmtree, (".",)),
        (np.load, ("made",)),
        (np.memmap, ("made", np.dtype("u1"), "w+", 0, 4)),
        (pickle.loads, (b"N.",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pickle_that_names_a_function_is_refused(tmp_path, monkeypatch, function, arguments):
    monkeypatch.chdir(tmp_path)
    contents = dump({b"data": Call(function, *arguments)})
    assert function.__name__ in changed(tmp_path, "cifar-10-python", "data_batch_1", contents)
    assert not (tmp_path / "made").exists()


def nested(count: int) -> bytes:
    """A tuple in a tuple ... as a dictionary's key: hashing it overflows the C stack."""
    return b"\x80\x02})" + b"\x85" * count + b"Ns."


def shared(depth: int) -> bytes:
    """A list of ten times a list of ten times ...: 10^depth numbers to whoever walks through it."""
    value = 0
    for _ in range(depth):
        value = [value] * 10
    return dump({b"data": value, b"labels": value})


def array(shape: tuple, contents: bytes = b"", text: str = "u1") -> bytes:
    """A batch whose data have a pickled array's form and claim a shape."""
    function, arguments, state = np.zeros(0, np.uint8).__reduce__()

    class Array:
        def __reduce__(self):
            return function, arguments, (state[0], shape, np.dtype(text), False, contents)

    return dump({b"data": Array(), b"labels": [0]})


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (dump({b"data": Call(np.ndarray, (2**40, 3072), np.dtype("u1"))}), "numpy.ndarray"),
        (array((2**40, 3072), b"x"), "reshape"),
        (array((1, 3072), bytes(3072), "S1"), "array of numbers"),
        (array((1, 3072), bytes(3072), "O"), "array of numbers"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "a dict"),  # C's unpickler would allocate 16 GB
        (b"\x80\x05\x96" + b"\0\0\0\0\2\0\0\0" + b".", "expected 8589934592"),  # BYTEARRAY8
        (b"\x80\x05\x96" + (4).to_bytes(8, "little") + b"abcd.", "BYTEARRAY8"),
        (nested(100_000), "a key is no text"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b".", "a dict"),
        (shared(9), "a list of integers"),
        (dump({b"data": np.zeros((1, 3072), np.uint8)})[:-1] + b"0" * 9, "POP"),
    ],
    ids=["ndarray", "shape", "text", "objects", "memo", "claim", "bytearray", "nested",
         "tuples", "shared", "pop"],
)  # fmt: skip
def test_pickle_that_asks_for_memory_is_refused(tmp_path, contents, why):
    assert why in changed(tmp_path, "cifar-10-python", "data_batch_1", contents)


def test_pickle_of_too_many_operations_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    contents = b"\x80\x02" + b"]" * 1000
    assert "more memory" in changed(tmp_path, "cifar-10-python", "data_batch_1", contents)


@pytest.mark.parametrize("encoded", [b"", b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R"])
def test_text_that_is_repeated_takes_memory_once(tmp_path, encoded):
    text = b"X" + (10_000_000).to_bytes(4, "little") + b"x" * 10_000_000 + b"q\0"
    key = b"X" + (11).to_bytes(4, "little") + b"label_names"
    contents = b"\x80\x02}" + key + b"](" + text + (encoded or b"h\0") * 1000 + b"es."
    tracemalloc.start()
    try:
        assert "repeats" in changed(tmp_path, "cifar-10-python", "batches.meta", contents)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


# ---- Archives that would do something


def with_member(tmp_path, name="x", kind=tarfile.REGTYPE, target="", size=0, first=True):
    """A CIFAR-10 archive with one member more."""
    path = tmp_path / "a.tar.gz"
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    whole = pack(tmp_path / "whole.tar", "cifar-10-binary", members_of("cifar-10-binary"), "w")
    with tarfile.open(path, "w:gz") as tar, tarfile.open(whole) as old:
        members = [(m, old.extractfile(m) if m.isfile() else None) for m in old]
        members.insert(0 if first else len(members), (info, io.BytesIO(bytes(size))))
        for member, contents in members:
            tar.addfile(member, contents)
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
        ({"name": "x/data_batch_1.bin"}, "is there twice"),
    ],
)
def test_archive_that_would_write_elsewhere_is_refused(tmp_path, member, why, first):
    path = with_member(tmp_path, **member, first=first)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert why in refusal(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_folder_in_an_archive_and_a_harmless_file_are_taken(tmp_path):
    for member in ({"name": "./x", "kind": tarfile.DIRTYPE}, {"name": "./notes..txt", "size": 9}):
        assert len(data.load(f"archive:{with_member(tmp_path, **member)}").test) == PER_BATCH


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])  # pax, global pax, GNU's long names
@pytest.mark.parametrize("size", [2**40, 2**28])
def test_header_that_claims_a_huge_name_is_not_read(tmp_path, kind, size):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    assert "unpacks to more than" in refusal(path)


def test_sparse_member_that_claims_to_be_small_is_not_skipped(tmp_path):
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


def test_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = with_member(tmp_path, size=1_000_000)
    assert len(data.load(f"archive:{path}").test) == PER_BATCH
    monkeypatch.setattr(archive, "MAX_ARCHIVE", 900_000)
    assert "unpacks to more than 900,000 bytes" in refusal(path)


def test_archive_of_too_many_members_or_a_pipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    assert "more than 5 members" in refusal(packed(tmp_path, "cifar-10-python"))
    os.mkfifo(tmp_path / "a.tar.gz")
    assert "a pipe or a device" in refusal(tmp_path / "a.tar.gz")
