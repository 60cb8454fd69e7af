"""Grad-CAM finds the regions that decide, and predict --explain shows them."""

import json

import keras
import numpy as np
import pytest
from PIL import Image

from keras_cifar import models
from keras_cifar.evaluation import grad_cam
from keras_cifar.models import layers, lenet5
from tests.conftest import colour_images
from tests.inference.test_predict import command

SIDE = 16


def colour_network(shift: int | None = None) -> keras.Model:
    """Class 0 is what is red, class 1 what is blue."""
    images = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(images)
    x = x if shift is None else layers.AddMirrored(shift)(x)
    x = keras.layers.Conv2D(2, 1, activation="relu", use_bias=False, name="conv")(x)
    x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = x if shift is None else layers.MeanOfMirrored(shift)(x)
    model = keras.Model(images, keras.layers.Dense(2, use_bias=False, name="logits")(x))
    model.get_layer("conv").set_weights([np.array([[[[1, 0], [0, 0], [0, 1]]]])])
    model.get_layer("logits").set_weights([np.array([[1, -1], [-1, 1]])])
    return model


@pytest.fixture
def squares() -> np.ndarray:
    """Two images with a red square at the top left and a blue one at the bottom right."""
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[:, 2:6, 2:6, 0] = 255
    images[:, 10:14, 10:14, 2] = 255
    return images


@pytest.mark.parametrize("shift", [None, 0, 1])
def test_the_heat_covers_what_decides_and_nothing_else(squares, shift):
    explainer = grad_cam.GradCam(colour_network(shift))
    heat = explainer.heat(squares, np.array([0, 1]))
    assert heat.dtype == np.float32
    expected = np.zeros((2, SIDE, SIDE))
    expected[0, 2:6, 2:6] = expected[1, 10:14, 10:14] = 1
    np.testing.assert_allclose(heat, expected, atol=1e-6)
    squares[..., 2] = 0
    assert not explainer.heat(squares, np.array([1, 1])).any()


def test_any_number_of_images_is_explained_alike(monkeypatch, random):
    images = random.integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    classes = np.array([0, 1, 0, 1, 1])
    explainer = grad_cam.GradCam(colour_network())
    whole = explainer.heat(images, classes)
    monkeypatch.setattr(grad_cam, "BATCH_SIZE", 2)
    np.testing.assert_allclose(explainer.heat(images, classes), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet20", "stage2_block2_relu"),
        ("lenet5", "conv2"),
        ("nin", "classes_1_relu"),
        ("vgg_bn_drop", "group5_3_relu"),
        ("googlenet", "inception5b_concat"),
        ("airbench94", "group2_2_gelu"),
    ],
)
def test_the_maps_are_those_of_the_last_convolutions(name, layer):
    with keras.StatelessScope(initialize_variables=False):
        model = models.build(name).deployable
        assert grad_cam.last_maps(model) is model.get_layer(layer).output


def test_the_maps_are_those_before_the_average_where_layers_follow_it():
    with keras.StatelessScope(initialize_variables=False):
        for name, channels in (("mobilenet", 1024), ("mobilenetv3small", 576)):
            model = models.build(name, (64, 64, 3)).deployable
            assert grad_cam.last_maps(model).shape == (None, 2, 2, channels)


def test_an_overlay_is_grey_where_it_is_cold_and_bright_where_it_is_hot():
    images = np.full((1, 2, 2, 3), (90, 120, 150), np.uint8)
    pixels = grad_cam.overlay(images, np.array([[[0.0, 0.5], [1.0, 0.0]]]))
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == pixels[0, 1, 1].tolist() == [120, 120, 120]
    assert pixels[0, 1, 0].min() < pixels[0, 1, 0].max() > 150  # yellow
    assert (pixels[0, 0, 1] != pixels[0, 1, 0]).any()


@pytest.fixture
def files(tmp_path):
    """Files of the same name in two folders, one of an odd name, and one that is not an image."""
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "b" / "..x y\n<é>.png"]
    for path, pixels in zip(paths, colour_images(3, 16, 3)[0], strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "bad.png").write_text("no image")
    return [str(path) for path in (paths[0], tmp_path / "bad.png", *paths[1:])]


def test_predict_writes_an_overlay_for_each_image(trained_run, files, tmp_path, capsys):
    flags = (f"--model={trained_run.path}", "--format=json")
    assert command(*flags, *files) == 1
    plain = capsys.readouterr().out
    out = tmp_path / "new" / "overlays"
    assert command(*flags, f"--explain={out}", *files) == 1
    captured = capsys.readouterr()
    assert captured.out == plain
    assert f"overlays  {out}\n" in captured.err
    names = ["00001_x.png", "00003_x.png", "00004__x_y_.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    shown, pixels = (np.asarray(Image.open(path)) for path in (out / names[1], files[2]))
    best = np.array([json.loads(plain)[2]["top"][0]["index"]])
    heat = grad_cam.GradCam(models.load(trained_run.model)).heat(pixels[np.newaxis], best)
    expected = grad_cam.overlay(pixels[np.newaxis], heat)[0]
    assert shown.shape == (224, 224, 3)
    np.testing.assert_array_equal(shown[::14, ::14], expected)


@pytest.mark.parametrize("source", ["export", "url", "other classes"])
def test_what_cannot_be_explained_is_one_line(source, trained_run, files, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "export").symlink_to(trained_run.export)
    sources = {"export": trained_run.export, "url": "http://x.example/v1", "other classes": run}
    if source == "other classes":
        lenet5.lenet5((16, 16, 3), num_classes=4).deployable.save(run / "model.keras")
    out = tmp_path / "overlays"
    assert command(f"--model={sources[source]}", f"--explain={out}", files[0]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "different images or classes" in captured.err or "--explain needs a run" in captured.err
    assert not out.exists()
