"""What tests share. TensorFlow starts with two virtual CPU devices, so that replicas can be tested."""

import contextlib
import io
import os
import pathlib
import re
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cifar.core import environment

# On any machine, tests have a CPU that is slower in bfloat16, where `auto` is float32. The processes
# that they start inherit it. Where the CPU has float16 instructions, TensorFlow asks oneDNN for kernels
# with them whatever the limit is.
_HAS_FLOAT16 = environment.cpu_has("avx512_fp16")
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16" if _HAS_FLOAT16 else "AVX512_CORE_VNNI"
environment.import_tensorflow()

import keras
import tensorflow as tf

_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Decoded images of tests, and of the processes they start, do not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fresh_keras():
    """No test sees another's precision or layer names."""
    yield
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


# Of a process that forks others: libraries start no threads when they are imported. Keras imports
# pandas where MLflow has installed it, and with it PyArrow, whose allocator has one.
WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


_FRACTION = re.compile(r"\d+\.\d+(?:e-\d+)?|\d+e-\d+")
# oneDNN's last bits depend on the size of the batch on CPUs with AVX2: float32 has 6e-8 of 1.
ROUNDING = 1e-6


def equal_but_for_rounding(text: str, *others: str) -> bool:
    """Whether texts are equal, fractions in them up to ROUNDING and all else exactly."""
    numbers = [float(number) for number in _FRACTION.findall(text)]
    return all(
        _FRACTION.sub("", other) == _FRACTION.sub("", text)
        and [float(n) for n in _FRACTION.findall(other)] == pytest.approx(numbers, abs=ROUNDING)
        for other in others
    )


def colour_images(count: int, side: int, classes: int, seed: int = 0) -> tuple:
    """(uint8 [N, side, side, 3], int64 [N]): noise around a grey of each class, easy to learn."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    grey = 30 + labels * 200 // max(classes - 1, 1)
    noise = random.integers(-20, 21, (count, side, side, 3))
    return np.clip(grey[:, None, None, None] + noise, 0, 255).astype(np.uint8), labels


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image file's contents."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(
    root: pathlib.Path, counts: dict[str, int], side: int = 16, classes: int = 3
) -> None:
    """Writes `root/<split>/<class>/NNN.png`; a split called "" is `root/<class>` itself."""
    for number, (split, count) in enumerate(counts.items()):
        images, labels = colour_images(count, side, classes, seed=number)
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:03}.png")


def refuse_folder(monkeypatch, folder: pathlib.Path) -> None:
    """Lets the system refuse to list one folder, as it does without the right to read it."""
    scandir = os.scandir

    def refuse(path):
        if pathlib.Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> pathlib.Path:
    """A folder of 96 training and 30 test pictures of 16 x 16 in 3 classes."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root, {"train": 96, "test": 30})
    return root


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, image_folder):
    """A finished run of lenet5 on `image_folder`, with its export."""
    from keras_cifar.core.config import TrainConfig
    from keras_cifar.core.run_directory import Run
    from keras_cifar.training import trainer

    run = Run(tmp_path_factory.mktemp("runs") / "run")
    config = TrainConfig.from_flags(
        model="lenet5",
        data=f"folder:{image_folder}",
        epochs=3,
        batch_size=16,
        augment="crop(2)|flip",
        run_dir=str(run.path),
    )
    trainer.train(config, run)
    return run


@pytest.fixture
def rewriting(monkeypatch) -> list:
    """A CPU that is faster in bfloat16, and what TensorFlow is told to rewrite.

    What it is told indeed would hold for the tests that follow, too.
    """
    told = []
    monkeypatch.setattr(tf.config.optimizer, "set_experimental_options", told.append)
    monkeypatch.setattr(environment, "bfloat16_gain", lambda: 1.6)
    return told


@pytest.fixture
def small_network(monkeypatch) -> str:
    """The name of a network with batch normalization for images of any size."""
    from keras_cifar import models
    from keras_cifar.models import classifier, layers, lenet5

    def build(input_shape, num_classes, name):
        images, x = classifier.image_input(input_shape)
        x = layers.conv_norm(x, 4, 3, name="conv")
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
        logits = keras.layers.Dense(num_classes, name="logits")(x)
        return classifier.Classifier.build_from(images, logits, name)

    monkeypatch.setitem(lenet5.VARIANTS, "small", models.Variant(build, "", 8, 10, 4))
    return "small"


@pytest.fixture(scope="session")
def served_run(trained_run):
    """A server of `trained_run`, in a process of its own."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="the extra `serve` is not installed")
    from tests.serving.server import serving

    with serving(trained_run.path) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """A Chromium: the one that CHROMIUM names, or one on PATH."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("no Chromium here; CHROMIUM=PATH names one")
    with api.sync_playwright() as playwright:
        # As root, in a container, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def full_disk():
    """A context in which this process can write no more than so many bytes to a file."""

    @contextlib.contextmanager
    def full(size: int = 1000):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full
