"""Every parser of input on mutated input: it succeeds, or says in one line what is wrong.

The cases are the same at each run. FUZZ_SECONDS=600 goes on with more of them for so long in each
test; a failure names its case, which FUZZ_FIRST=CASE starts with.
"""

import contextlib
import io
import itertools
import json
import os
import random
import string
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from keras_cifar import models
from keras_cifar.core import cli
from keras_cifar.core.config import DevicesConfig, TrainConfig
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.image_size import STRETCH
from keras_cifar.core.run_directory import Run
from keras_cifar.data import archive, augmentation
from keras_cifar.data.cache import Cache
from keras_cifar.data.images import load_image
from keras_cifar.data.splits import BadImages
from keras_cifar.distributed import cluster
from keras_cifar.training import optimizers
from tests.core.test_run_directory import config
from tests.data.test_archive import FOLDERS, members_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))

# Where a length, an offset or a count is replaced by one of these, damage is likely.
NUMBERS = tuple(
    (value % 2**bits).to_bytes(bits // 8, order)
    for bits in (8, 16, 32, 64)
    for value in (0, 1, -1, 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    for order in ("little", "big")
)


def mutated(chance: random.Random, samples: list[bytes], bits: tuple = NUMBERS) -> bytes:
    """One of the samples, damaged in up to eight places; rarely noise alone."""
    if chance.random() < 0.02:
        return chance.randbytes(chance.randrange(200))
    data = bytearray(chance.choice(samples))
    for _ in range(chance.randint(1, 8)):
        # What a file begins and ends with is what parsers read most of.
        place = chance.choice((min(len(data), 400), len(data)))
        start = chance.randrange(place + 1)
        if chance.random() < 0.2:
            start = max(0, len(data) - start)
        stop = min(len(data), start + chance.choice((1, 1, 2, 4, 16, 300)))
        other = chance.choice(samples)
        place = chance.randrange(len(other) + 1)
        data[start:stop] = chance.choice(
            (
                bytes(byte ^ (1 << chance.randrange(8)) for byte in data[start:stop]),
                chance.randbytes(stop - start),
                chance.choice(bits),
                b"",
                2 * data[start:stop],
                other[place : place + chance.choice((1, 8, 64))],
            )
        )
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.05 else data)


def cases(count: int) -> Iterator[tuple[int, random.Random]]:
    """(number, its own chance) of so many cases, or of as many as FUZZ_SECONDS allows."""
    end = time.monotonic() + SECONDS
    for number in itertools.count(FIRST):
        if number >= FIRST + count and time.monotonic() >= end:
            return
        yield number, random.Random(number)


def check(number: int, given: object, parse: Callable) -> bool:
    """Whether a parser takes what is given; all but a UserError of one line fails the test."""
    start = time.monotonic()
    try:
        parse()
        return True
    except UserError as error:
        message = str(error)
        assert message, (number, given)
        assert message.isprintable(), (number, given)
        return False
    except Exception as error:
        raise AssertionError(f"case {number}: {given!r:.2000}") from error
    finally:
        assert time.monotonic() - start < 5, (number, given)


def run(count: int, make: Callable, parse: Callable) -> None:
    """Parses what `make(chance)` gives; some of it must be taken and some refused."""
    taken = []
    for number, chance in cases(count):
        given = make(chance)
        taken.append(check(number, given, lambda given=given: parse(given)))
    assert any(taken)
    assert not all(taken)


# ---- Archives


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            out.addfile(info, io.BytesIO(contents))
    return file.getvalue()


KINDS = tuple(FOLDERS)


def test_archives(tmp_path):
    path = tmp_path / "a.tar"
    whole = [tar(members_of(kind)) for kind in KINDS]

    def make(chance):
        if chance.random() < 0.4:
            return mutated(chance, whole)
        members = members_of(chance.choice(KINDS))
        name = chance.choice(sorted(members))
        return tar(members | {name: mutated(chance, list(members.values()))})

    def parse(contents):
        path.write_bytes(contents)
        archive.load(str(path), None, None, STRETCH, Cache(), BadImages())

    run(150, make, parse)


def test_pickles():
    samples = [v for kind in KINDS[::2] for v in members_of(kind).values()]
    # Without the pixels, so that what is damaged is what is parsed.
    short = [sample.replace(max(sample.split(b"X"), key=len), b"") for sample in samples]

    def parse(contents):
        try:
            data, labels = archive._unpickle(contents, b"data", b"labels")
        except Exception as error:  # `load` names the member.
            raise UserError(reason(error)) from None
        with contextlib.suppress(Exception):
            archive._array(data)
            archive._array(labels)

    run(2000, lambda chance: mutated(chance, samples + short), parse)


# ---- Images


def image_files() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8)
    rgba = Image.fromarray(noise)
    found = []

    def add(image, form, **options):
        file = io.BytesIO()
        image.save(file, form, **options)
        found.append(file.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    palette = rgb.convert("P")
    add(rgb, "JPEG", exif=exif)
    add(rgb, "JPEG", progressive=True)
    add(rgb.convert("CMYK"), "JPEG")
    for image in (rgba, rgb, grey, palette, rgb.convert("1"), rgba.convert("LA")):
        add(image, "PNG")
    add(Image.fromarray(noise[..., 0].astype(np.uint16) * 200), "PNG")
    add(palette, "PNG", transparency=3)
    add(rgb, "BMP")
    add(palette, "BMP")
    add(palette, "GIF", save_all=True, append_images=[palette.rotate(90)], transparency=1)
    add(rgb, "WEBP")
    add(rgba, "WEBP", lossless=True)
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add(rgb, "TIFF", compression=compression)
    add(grey.convert("F"), "TIFF")
    add(rgb, "PPM")
    add(grey, "PPM")
    add(rgba, "ICO", sizes=[(8, 8)])
    add(rgb, "JPEG2000")
    add(rgb, "AVIF")
    return found


@pytest.mark.filterwarnings("ignore")
def test_images(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # Large ones take their time.
    samples = image_files()
    for sample in samples:
        assert load_image(sample).ndim == 3

    def parse(contents):
        for size in ((8, 8), None):
            pixels = load_image(contents, size)
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3

    run(1500, lambda chance: mutated(chance, samples), parse)


# ---- Strings of flags


WORDS = (
    "",
    " ",
    "(",
    ")",
    ",",
    "|",
    "=",
    ".5",
    "1e999",
    "nan",
    "-1",
    "0",
    "é",
    "\n",
    "\0",
    "٣",
    "²",
)
JSON = (b"null", b"[]", b"{}", b'"', b"1e999", b"NaN", b"-1", b"0", b"9" * 5000, b"true")


def text(chance: random.Random, samples: tuple[str, ...]) -> str:
    """A sample of which parts are left out, doubled or replaced."""
    parts = list(chance.choice(samples))
    for _ in range(chance.randint(0, 4)):
        place = chance.randrange(len(parts) + 1)
        new = chance.choice((*WORDS, *samples, chance.choice(string.printable), "\udcff", "9" * 40))
        parts[place : place + chance.choice((0, 0, 1, 3))] = [new] if chance.random() < 0.7 else []
    return "".join(parts)


def test_worker_lists():
    def parse(given):
        config = DevicesConfig(workers=given[0], worker_index=given[1])
        cluster.find_cluster(config, {})

    samples = ("a:1,b:2", "10.0.0.1:80", "[::1]:12345,host.example:1", "a:1")
    run(3000, lambda chance: (text(chance, samples), chance.randint(-1, 2)), parse)


def test_tf_config():
    samples = [
        json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}}).encode()
        for cluster in ({"worker": ["a:1", "b:2"]}, {"chief": ["a:1"], "worker": ["b:1"]})
        for kind in ("worker", "chief")
        for index in (0, 1)
    ]

    def parse(contents):
        cluster.find_cluster(DevicesConfig(), {"TF_CONFIG": contents})

    def make(chance):
        # Not in an environment variable: what is no UTF-8 is an escaped byte there.
        return mutated(chance, samples, (*JSON, b'"a:1"')).decode("utf-8", "surrogateescape")

    run(3000, make, parse)


def test_slurm():
    right = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURMD_NODENAME": "n2",
        "SLURM_LOCALID": "0",
    }

    def make(chance):
        environ = dict(right)
        for name in chance.sample(sorted(right), chance.randint(0, 2)):
            environ[name] = chance.choice((*right.values(), *WORDS, "[", "n[2-1]", "n[1-"))
        return environ

    def parse(environ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                if "\0" not in value:
                    patch.setenv(name, value)
            cluster.find_cluster(DevicesConfig(), environ)

    run(500, make, parse)


def test_augmentations_schedules_and_command_lines():
    steps = ("crop(4)|flip", "cutout(8)|mixup(0.2)", "color(0.4)", "randaugment(2,9)", "cutmix(1)")
    run(60, lambda chance: text(chance, steps), augmentation.parse)
    schedules = ("constant", "cosine", "step(0.5,0.75)", "step(0.1)", "onecycle")
    run(3000, lambda chance: text(chance, schedules), optimizers.parse_schedule)
    flags = ("--epochs=3", "--data=digits", "--noexport", "--seed=1", "--ema=0.5", "--model=vgg11")
    run(
        150,
        lambda c: [text(c, flags) for _ in range(c.randint(0, 3))],
        lambda argv: cli.parse(TrainConfig, argv),
    )


@pytest.mark.parametrize(
    "task",
    ['{"index": 1e999}', '{"index": ' + "[" * 100_000, '{"index": NaN}', '{"type": ["a:1"]}', "[]"],
)
def test_what_fuzzing_found(task):
    text = f'{{"cluster": {{"worker": ["a:1"]}}, "task": {task}}}'
    with pytest.raises(UserError, match="TF_CONFIG"):
        cluster.find_cluster(DevicesConfig(), {"TF_CONFIG": text})
    with pytest.raises(UserError, match="does not take an argument"):
        cli.parse(TrainConfig, ["--noexport="])


# ---- Runs


def test_run_configurations(tmp_path):
    given = Run(tmp_path)
    samples = [json.dumps(config()).encode()]

    def parse(contents):
        given.config.write_bytes(contents)
        found = given.read_config()
        TrainConfig().differences(found["flags"])
        TrainConfig.from_json(found["flags"]).replace()

    run(600, lambda chance: mutated(chance, samples, (*JSON, b"[" * 2000)), parse)


def test_model_files(tmp_path):
    path = tmp_path / "m.keras"
    models.build("lenet5", (16, 16, 3), 3).deployable.save(path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    samples = [path.read_bytes()]

    def make(chance):
        if chance.random() < 0.3:
            return mutated(chance, samples)
        file, name = io.BytesIO(), chance.choice(sorted(members))
        with zipfile.ZipFile(file, "w") as out:
            for member, contents in members.items():
                changed = (
                    mutated(chance, [contents], (*JSON, b'"Lambda"'))
                    if member == name
                    else contents
                )
                out.writestr(member, changed)
        return file.getvalue()

    def parse(contents):
        path.write_bytes(contents)
        models.load(path)

    run(60, make, parse)
