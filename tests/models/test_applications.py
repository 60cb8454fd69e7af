"""The networks of keras.applications: equal to Keras's own, and as useful as the others."""

import functools
import re
import urllib.error

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.errors import UserError
from keras_cifar.evaluation import grad_cam
from keras_cifar.exporters import folding, saved_model
from keras_cifar.models import applications, layers
from keras_cifar.pretrained import weights
from tests.exporters.test_folding import images as smooth_images
from tests.models.test_models import skeleton

NAMES = tuple(applications.VARIANTS)
# {a network of each family: the normalizations that cannot be folded}
FAMILIES = {
    "mobilenet": 0, "mobilenetv3small": 0, "efficientnetb0": 0, "convnexttiny": 0,
    "densenet121": 62, "efficientnetv2b0": 0, "inceptionresnetv2": 0, "inceptionv3": 0,
    "mobilenetv2": 0, "nasnetmobile": 4, "resnet50v2": 17, "xception": 0,
}  # fmt: skip
QUICK = tuple(FAMILIES)[:2]


def marked(names) -> list:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def pixels(side: int, count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalizations(model: keras.Model) -> int:
    return sum(isinstance(x, keras.layers.BatchNormalization) for x in model.layers)


def preprocess(name: str, images: np.ndarray) -> np.ndarray:
    """Keras's own preprocessing."""
    module = applications.FUNCTIONS[name].__module__.rpartition(".")[2]
    return getattr(keras.applications, module).preprocess_input(images.astype(np.float64))


def randomize(model: keras.Model, images: np.ndarray) -> None:
    """Gives a network of Keras scales and offsets, and the statistics of preprocessed images."""
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name in ("gamma", "beta", "bias"):
            low = 0.5 if variable.name == "gamma" else -0.5
            variable.assign(random.uniform(low, low + 1, variable.shape))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
        elif isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    model(images, training=True)


def load_from(monkeypatch, theirs: keras.Model, model: models.Classifier) -> None:
    """Takes the weights of ImageNet with `theirs` in place of a download."""
    own = applications.FUNCTIONS[model.name]
    fake = functools.wraps(own)(lambda **arguments: theirs)
    with monkeypatch.context() as patch:
        patch.setitem(applications.FUNCTIONS, model.name, fake)
        weights.take(model, "imagenet", ())


# ---- Equal to Keras


@functools.cache
def exchanged(name: str) -> tuple:
    """(our network with the weights of Keras's, images, Keras's logits for them), in float64."""
    keras.config.set_dtype_policy("float64")
    side = applications.VARIANTS[name].min_size
    images = smooth_images(8, side)
    keras.utils.set_random_seed(0)
    options = {"input_shape": (side, side, 3), "classes": 1000}
    theirs = applications.FUNCTIONS[name](weights=None, classifier_activation=None, **options)
    if name in applications.NORMALIZED_BY_WEIGHTS:
        normalize_efficientnet(theirs, np.square(DEVIATIONS))
    given = preprocess(name, images)
    randomize(theirs, given)
    model = models.build(name, (side, side, 3), 1000)
    with pytest.MonkeyPatch.context() as patch:
        load_from(patch, theirs, model)
    return model, images, theirs(given, training=False).numpy()


MEANS, DEVIATIONS = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalize_efficientnet(model: keras.Model, variances: np.ndarray) -> None:
    (layer,) = (x for x in model.layers if isinstance(x, keras.layers.Normalization))
    layer.adapt_mean.assign(MEANS)
    layer.adapt_variance.assign(variances)
    layer.finalize_state()


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_computes_what_kerass_network_does(name, tmp_path):
    model, images, expected = exchanged(name)
    scale = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 0.1 * scale  # The outputs depend on the images.
    logits = keras.Model(model.inputs[0], model.get_layer("logits").output)
    found = logits(images, training=False).numpy()
    # Keras rounds pixels to float32 before preprocessing or after; random weights amplify that.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * scale)
    found = model(images, training=False).numpy()
    np.testing.assert_allclose(found, tf.nn.softmax(expected), atol=1e-5)

    network = model.deployable
    network.save(tmp_path / "model.keras")
    loaded = models.load(tmp_path / "model.keras")
    (tmp_path / "model.keras").unlink()
    np.testing.assert_allclose(loaded(images, training=False), found, atol=1e-6)
    folded = folding.fold(loaded, kept="features")
    assert normalizations(folded) == FAMILIES[name]
    np.testing.assert_allclose(folded(images, training=False), found, atol=1e-5)
    heat = grad_cam.GradCam(loaded).heat(images[:1], np.array([1]))
    assert heat.shape == (1, *images.shape[1:3])


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_preprocessing_is_kerass(name):
    side = applications.VARIANTS[name].min_size
    images, expected = pixels(side, 1), preprocess(name, pixels(side, 1))
    theirs = applications.FUNCTIONS[name](weights=None, input_shape=(side, side, 3), classes=10)
    if name in applications.NORMALIZED_BY_WEIGHTS:
        normalize_efficientnet(theirs, np.square(DEVIATIONS))
    for layer in theirs.layers[1:]:
        if not isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
            break
        expected = layer(expected)
    scaling = skeleton(name, (side, side, 3)).get_layer("scale")
    np.testing.assert_allclose(scaling(images), expected, atol=1e-6)


def test_multiply_adds_are_those_of_the_papers():
    # MobileNets: 569 million (Howard et al. 2017, table 4), 300 (Sandler et al. 2018, table 4) and
    # 56 (Howard et al. 2019, table 3), which have no batch normalization and no bias either.
    for name, millions in {"mobilenet": 569, "mobilenetv2": 300, "mobilenetv3small": 56}.items():
        found = models.count_multiply_adds(skeleton(name, (224, 224, 3), 1000))
        assert found / 1e6 == pytest.approx(millions, rel=0.02), name


def test_separable_convolutions_count_as_both_of_their_parts():
    x = keras.Input((8, 8, 4))
    model = keras.Model(x, keras.layers.SeparableConv2D(6, 3, padding="same")(x))
    assert models.count_multiply_adds(model) == 64 * (9 * 4 + 4 * 6)


# ---- Names and layers


def test_table_has_every_network_of_keras_but_those_of_this_package():
    functions = {n.lower() for n in dir(keras.applications) if n[0].isupper()}
    assert len(NAMES) >= 35
    assert functions == set(NAMES) | set(applications.OURS)
    for name in applications.OURS:
        assert models.variants()[name].builder is not applications.application
    for name, variant in applications.VARIANTS.items():
        assert models.variants()[name] is variant
        assert re.search(r"\w, arXiv:\d{4}\.\d{5}$", variant.paper), variant.paper


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_too_small_are_refused_in_one_line(name):
    side = applications.VARIANTS[name].min_size
    with pytest.raises(UserError, match=f"{name} needs images of at least {side} x {side}") as e:
        models.build(name, (side, side - 1, 3), 10)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", marked(NAMES))
def test_has_our_layers_and_kerass_size(name):
    variant = applications.VARIANTS[name]
    with keras.StatelessScope(initialize_variables=False):
        theirs = applications.FUNCTIONS[name](weights=None)
    if theirs.input_shape[1]:  # MobileNetV3 has no default.
        assert theirs.input_shape == (None, variant.image_size, variant.image_size, 3)
    side = variant.min_size
    model = skeleton(name, (side, side, 3), 1000)
    assert models.count_parameters(model) == models.count_parameters(theirs)
    kept = [layer.name for layer in model.layers if layer.name in ("images", "scale", "features")]
    assert kept == ["images", "scale", "features"]
    assert [layer.name for layer in model.layers[-2:]] == ["logits", "probabilities"]
    assert model.get_layer("features").output.shape[-1] > 10
    assert model.inputs[0].dtype == "uint8"
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            assert type(layer) is layers.BatchNormalization
            assert layer.momentum == 0.9
        # Masks that differ between replicas.
        assert type(layer) is layers.Dropout or not hasattr(layer, "seed_generator")
        assert type(layer).__name__ != "StochasticDepth"
        # Exactly one preprocessing, and no sequence that hides layers.
        assert not isinstance(layer, (keras.layers.Normalization, keras.Sequential))
        assert layer.name == "scale" or not isinstance(layer, keras.layers.Rescaling)
    layers.check_for_replicas(model)


def test_names_and_epsilons_are_kerass_and_do_not_depend_on_other_networks():
    first = skeleton.__wrapped__("xception", (71, 71, 3))
    second = skeleton.__wrapped__("xception", (75, 75, 3))
    names = [layer.name for layer in second.layers]
    assert names == [layer.name for layer in first.layers]
    assert {"block1_conv1", "conv2d", "conv2d_3", "batch_normalization"} < set(names)
    assert first.get_layer("batch_normalization").epsilon == 1e-3


def test_images_that_are_not_square_and_other_precisions_are_built():
    assert skeleton("mobilenetv3small", (32, 48, 3), 7).output_shape == (None, 7)
    keras.config.set_dtype_policy("mixed_float16")
    model = skeleton.__wrapped__("mobilenetv3small", (32, 32, 3))
    assert model.get_layer("scale").scale == pytest.approx([1 / 127.5] * 3, rel=1e-6)
    assert model.get_layer("conv").compute_dtype == "float16"
    assert model.outputs[0].dtype == "float32"


# ---- Training and export


def test_a_step_trains_all_weights_and_updates_the_statistics():
    keras.utils.set_random_seed(0)
    model = models.build("mobilenetv3small", (32, 32, 3), 10)
    model.compile("sgd", run_eagerly=True)
    before = {v.path: v.numpy() for v in model.weights}
    model.fit(pixels(32), np.eye(10, dtype=np.float32)[:8], batch_size=8, verbose=0)
    for variable in model.weights:
        if "seed" not in variable.path:
            assert not np.array_equal(variable.numpy(), before[variable.path]), variable.path


def test_exports_to_a_saved_model(tmp_path):
    model = models.build("mobilenetv3small", (32, 32, 3), 3).deployable
    path = saved_model.export(model, tmp_path / "m", ("cat", "dog", "frog"))
    loaded, images = tf.saved_model.load(str(path)), pixels(32, 2)
    found = loaded.signatures["serving_default"](images=tf.constant(images))["probabilities"]
    np.testing.assert_allclose(found, model(images, training=False), atol=1e-5)
    features = loaded.signatures["features"](images=tf.constant(images))["features"]
    assert features.shape == (2, 1024)


# ---- Weights of ImageNet


@pytest.fixture
def imagenet(monkeypatch):
    """Lets Keras's EfficientNetB0 read other weights in place of ImageNet's; gives the networks."""
    made = []

    def load_weights(model, path):
        # As in Keras's file: the deviations where the layer has variances.
        normalize_efficientnet(model, DEVIATIONS * imagenet_error[0])
        randomize(model, np.zeros((1, 224, 224, 3), np.float32))
        made.append(model)

    imagenet_error = [1.0]
    monkeypatch.setattr(keras.utils.get_file.__module__ + ".get_file", lambda *a, **k: "weights.h5")
    monkeypatch.setattr(keras.Model, "load_weights", load_weights)
    return made, imagenet_error


def test_weights_of_imagenet_come_with_their_preprocessing(imagenet):
    made, error = imagenet
    model = models.build("efficientnetb0", (224, 224, 3), 1000)
    weights.take(model, "imagenet", ())
    images = pixels(224, 1)
    expected = made[0](images.astype(np.float32), training=False)
    np.testing.assert_allclose(model(images, training=False), expected, atol=1e-5)
    error[0] = 2.0
    with pytest.raises(UserError, match="efficientnetb0 belong to other preprocessing"):
        weights.take(model, "imagenet", ())


def test_the_classifier_of_other_classes_keeps_its_weights(monkeypatch):
    model = models.build("mobilenetv3small", (32, 32, 3), 10)
    theirs = applications.FUNCTIONS["mobilenetv3small"](weights=None, input_shape=(224, 224, 3))
    head = model.get_layer("logits").get_weights()
    load_from(monkeypatch, theirs, model)
    for old, new in zip(head, model.get_layer("logits").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for name in ("conv", "conv_2"):
        ours, same = (m.get_layer(name).kernel.numpy() for m in (model, theirs))
        np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_a_failed_download_says_what_to_get_and_where_to_put_it(monkeypatch, tmp_path, error, why):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    model = skeleton("mobilenetv3small", (32, 32, 3), 10)
    with pytest.raises(UserError, match=re.escape(why)) as caught:
        weights.take(model, "imagenet", ())
    name = "weights_mobilenet_v3_small_224_1.0_float.h5"
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(rf"https://storage.googleapis.com/\S+/{name} cannot be downloaded: ", text)
    assert text.endswith(f"save it as {tmp_path}/models/{name}")
