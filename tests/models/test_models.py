"""The networks: their sizes, their layers, and that each one trains, saves and loads."""

import base64
import functools
import json
import marshal
import os
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.models import layers, resnet_cifar

NAMES = tuple(models.variants())
QUICK = tuple(name for name in NAMES if name != "resnet1202")
ALL = (*QUICK, pytest.param("resnet1202", marks=pytest.mark.slow))


@functools.lru_cache(maxsize=2)
def skeleton(name: str, shape: tuple, classes: int = 10) -> models.Classifier:
    """The network without the memory of its weights."""
    with keras.StatelessScope(initialize_variables=False):
        return models.build(name, shape, classes)


def batch(count: int, shape: tuple = (32, 32), classes: int = 10, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    return images, np.eye(classes, dtype=np.float32)[np.arange(count) % classes]


def one_step(model: models.Classifier, images, labels) -> None:
    model.fit(images, labels, batch_size=len(images), verbose=0)


# ---- Sizes

IMAGENET = {
    "alexnet": 60_965_224,
    "googlenet": 6_998_552,
    "googlenet_bn": 7_013_112,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
}


def resnet_cifar_size(depth: int) -> int:
    """Stem, blocks of two 3 x 3 convolutions, 1 x 1 shortcuts, classifier; 2 numbers a BN channel."""
    blocks = (depth - 2) // 6
    total = 3 * 16 * 9 + 2 * 16
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += (before * width + (2 * blocks - 1) * width * width) * 9 + 2 * blocks * 2 * width
        if before != width:
            total += before * width + 2 * width
    return total + 64 * 10 + 10


def vgg_bn_drop_size() -> int:
    total, before = 0, 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            total += 9 * before * width + width + 2 * width
            before = width
    return total + (512 * 512 + 512) + 2 * 512 + (512 * 512 + 512) + (512 * 10 + 10)


@pytest.mark.parametrize(("name", "parameters"), IMAGENET.items())
def test_size_at_224_with_1000_classes_is_the_published_one(name, parameters):
    assert models.count_parameters(skeleton(name, (224, 224, 3), 1000).deployable) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nin", 966_986),
        ("lenet5", 62_006),
        ("vgg_bn_drop", 15_254_602),
        ("airbench94", 1_971_352),
        ("airbench_small", 568_728),
    ],
)
def test_size_at_32_with_10_classes_is_the_documented_one(name, parameters):
    assert models.count_parameters(skeleton(name, (32, 32, 3)).deployable) == parameters


def test_size_of_vgg_bn_drop_is_that_of_the_chapters_layers():
    model = skeleton("vgg_bn_drop", (32, 32, 3))
    assert models.count_parameters(model.deployable) == vgg_bn_drop_size()


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 1202])
def test_size_of_resnets_for_cifar_follows_the_paper(depth):
    model = skeleton(f"resnet{depth}", (32, 32, 3))
    assert models.count_parameters(model.deployable) == resnet_cifar_size(depth)


@pytest.mark.parametrize(
    ("name", "parameters"), [("googlenet", 13_378_280), ("googlenet_bn", 13_393_352)]
)
def test_size_of_googlenet_in_training_counts_its_auxiliary_classifiers(name, parameters):
    assert models.count_parameters(skeleton(name, (224, 224, 3), 1000).logits_model) == parameters


@pytest.mark.parametrize(
    ("name", "side", "classes", "expected", "tolerance"),
    [
        ("resnet18", 224, 1000, 1.81e9, 0.01e9),
        ("vgg16", 224, 1000, 15.47e9, 0.01e9),
        ("resnet20", 32, 10, 40.8e6, 0.05e6),
        # By hand: 28 x 28 x 6 x 75, 10 x 10 x 16 x 150, and the dense layers.
        ("lenet5", 32, 10, 352_800 + 240_000 + 48_000 + 10_080 + 840, 0),
    ],
)
def test_multiply_adds_are_the_published_ones(name, side, classes, expected, tolerance):
    model = skeleton(name, (side, side, 3), classes).deployable
    assert models.count_multiply_adds(model) == pytest.approx(expected, abs=tolerance)


def test_describe_gives_the_size_of_the_deployed_network_of_the_paper():
    name, size, parameters, multiply_adds, paper = models.describe("googlenet")
    assert (name, size, parameters) == ("googlenet", 224, 6_998_552)
    deployed = skeleton("googlenet", (224, 224, 3), 1000).deployable
    assert multiply_adds == models.count_multiply_adds(deployed)
    assert "1409.4842" in paper


# ---- Every network


def recompute_statistics(model: models.Classifier, images, labels) -> None:
    """On one batch, without tracing, which takes deep networks minutes."""
    tf.config.run_functions_eagerly(True)
    try:
        model.recompute_statistics(iter([(tf.constant(images), tf.constant(labels))]), 1)
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("name", ALL)
def test_trains_saves_and_loads(name, tmp_path):
    keras.utils.set_random_seed(0)
    images, labels = batch(2)
    model = models.build(name, (32, 32, 3), 10)
    model.compile("sgd", run_eagerly=True)
    before = {v.path: v.numpy() for v in model.logits_model.trainable_variables if len(v.shape) > 1}
    one_step(model, images, labels)
    unchanged = [
        v.path
        for v in model.logits_model.trainable_variables
        if v.path in before and np.array_equal(v.numpy(), before[v.path])
    ]
    assert unchanged == []

    # Without statistics of its own, a network of 1,202 layers overflows.
    recompute_statistics(model, images, labels)
    network, path = model.deployable, tmp_path / "model.keras"
    network.save(path)
    loaded = models.load(path)
    path.unlink()
    expected, got = (m(images, training=False).numpy() for m in (network, loaded))
    assert expected.shape == (2, 10)
    assert expected.min() >= 0
    np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert "features" in {layer.name for layer in loaded.layers}


@pytest.fixture(scope="module", params=ALL)
def smallest(request) -> models.Classifier:
    """Each network for the smallest images that it takes."""
    side = models.variants()[request.param].min_size
    with keras.StatelessScope(initialize_variables=False):
        return models.build(request.param, (side, side, 3), 10)


def test_builds_at_its_smallest_size_and_refuses_a_smaller_one(smallest):
    side = models.variants()[smallest.name].min_size
    assert smallest.input_shape == (None, side, side, 3)
    assert smallest.output_shape == (None, 10)
    for height, width in ((side - 1, side), (side, side - 1)):
        with pytest.raises(UserError, match=f"at least {side} x {side} pixels") as error:
            models.build(smallest.name, (height, width, 3), 10)
        assert "\n" not in str(error.value)
        assert f"{width} x {height}" in str(error.value)


def test_batch_norm_has_the_chapters_momentum_and_epsilon(smallest):
    norms = [
        layer
        for layer in smallest.logits_model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert {(norm.momentum, norm.epsilon) for norm in norms} <= {(0.9, 1e-5)}
    normalized = smallest.name.startswith(("resnet", "airbench")) or "_bn" in smallest.name
    assert bool(norms) == normalized


def test_features_come_before_the_logits_and_are_more_than_the_classes(smallest):
    names = [layer.name for layer in smallest.deployable.layers]
    assert names.count("features") == 1
    assert names.index("features") < names.index("logits")
    assert names[-1] == "probabilities"
    assert smallest.get_layer("features").output.shape[-1] > 10


@pytest.mark.parametrize("name", ["lenet5", "nin", "resnet20", "resnet18", "vgg_bn_drop"])
def test_takes_images_that_are_not_square(name):
    images, _ = batch(2, (32, 48))
    probabilities = models.build(name, (32, 48, 3), 7)(images, training=False).numpy()
    assert probabilities.shape == (2, 7)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_pixels_are_scaled_to_plus_minus_one():
    model = skeleton("resnet20", (32, 32, 3))
    scale = keras.Model(model.inputs[0], model.get_layer("scale").output)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 0, 0] = (0, 255, 51)
    np.testing.assert_allclose(scale(images).numpy()[0, 0, 0], (-1, 1, -0.6), atol=1e-6)


# ---- Layer by layer


def blocks(stage_counts: tuple, width_first: int) -> list:
    """(layer class, number) of the chapter's groups; number is filters or rate."""
    expected = []
    for count, filters in stage_counts:
        first = 0.3 if filters == width_first else 0.4
        for index in range(count):
            expected += [("Conv2D", filters), ("BatchNormalization", None), ("ReLU", None)]
            if index < count - 1:
                expected.append(("Dropout", first))
        expected.append(("MaxPooling2D", None))
    return expected


def outline(model: keras.Model) -> list:
    number = {"Conv2D": "filters", "Dense": "units", "Dropout": "rate"}
    ours = ("Conv2D", "BatchNormalization", "Dropout")

    def kind(layer) -> str:
        """The name of Keras's layer that it is a kind of."""
        same = [name for name in ours if isinstance(layer, getattr(keras.layers, name))]
        return same[0] if same else type(layer).__name__

    kinds = [(kind(layer), layer) for layer in model.layers]
    return [(kind, getattr(layer, number.get(kind, ""), None)) for kind, layer in kinds]


def test_vgg_bn_drop_is_the_chapters_sequence_of_layers():
    groups = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    assert outline(skeleton("vgg_bn_drop", (32, 32, 3)).deployable) == [
        ("InputLayer", None),
        ("Rescaling", None),
        *blocks(groups, width_first=64),
        ("Flatten", None),
        ("Dropout", 0.5),
        ("Dense", 512),
        ("BatchNormalization", None),
        ("ReLU", None),
        ("Dropout", 0.5),
        ("Dense", 512),
        ("Dense", 10),
        ("Activation", None),
    ]


def test_vgg_bn_drop_has_the_chapters_rates_group_by_group():
    by_name = {layer.name: layer for layer in skeleton("vgg_bn_drop", (32, 32, 3)).layers}
    rates = []
    for group, count in enumerate((2, 2, 3, 3, 3), start=1):
        names = [f"group{group}_{index}_drop" for index in range(1, count + 1)]
        rates.append([by_name[name].rate if name in by_name else 0 for name in names])
    assert rates == [[0.3, 0], [0.4, 0], [0.4, 0.4, 0], [0.4, 0.4, 0], [0.4, 0.4, 0]]


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "last"),
    [(32, 3, 1, 4), (64, 3, 1, 8), (65, 7, 2, 3), (224, 7, 2, 7)],
)
def test_resnet18_has_a_stem_for_the_size_of_its_images(side, kernel, stride, last):
    model = skeleton("resnet18", (side, side, 3))
    stem = model.get_layer("stem_conv")
    assert (stem.kernel_size, stem.strides) == ((kernel, kernel), (stride, stride))
    assert model.get_layer("features").input.shape[1:3] == (last, last)


@pytest.mark.parametrize(
    ("name", "side", "layer", "kernel", "stride"),
    [
        ("alexnet", 64, "conv1_conv", 5, 1),
        ("alexnet", 224, "conv1_conv", 11, 4),
        ("googlenet", 64, "stem1_conv", 3, 1),
        ("googlenet", 224, "stem1_conv", 7, 2),
    ],
)
def test_stems_of_imagenet_networks_shrink_on_small_images(name, side, layer, kernel, stride):
    stem = skeleton(name, (side, side, 3)).get_layer(layer)
    assert (stem.kernel_size, stem.strides) == ((kernel, kernel), (stride, stride))


@pytest.mark.parametrize(("side", "first", "last"), [(32, 16, 4), (224, 28, 7)])
def test_googlenet_has_the_documented_sides_at_its_blocks(side, first, last):
    model = skeleton("googlenet", (side, side, 3))
    assert model.get_layer("inception3a_concat").output.shape[1:] == (first, first, 256)
    assert model.get_layer("inception5b_concat").output.shape[1:] == (last, last, 1024)


def test_alexnet_at_224_has_the_sides_of_the_paper():
    model = skeleton("alexnet", (224, 224, 3), 1000)
    sides = [model.get_layer(f"conv{i}_pool").input.shape[1] for i in (1, 2, 5)]
    assert sides == [55, 27, 13]
    assert model.get_layer("flatten").output.shape == (None, 6 * 6 * 256)


def test_bottleneck_strides_on_its_3_x_3_convolution():
    model = skeleton("resnet50", (224, 224, 3), 1000)
    strides = [model.get_layer(f"stage1_block0_{i}_conv").strides for i in (1, 2, 3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


# ---- Shared blocks


def test_convolution_with_a_stride_pads_both_sides_alike():
    images = keras.Input((8, 8, 1))
    model = keras.Model(images, layers.conv(images, 1, 3, 2, name="c", bias=False))
    model.get_layer("c").kernel.assign(tf.ones((3, 3, 1, 1)))
    sums = model(np.ones((1, 8, 8, 1), np.float32)).numpy()[0, ..., 0]
    np.testing.assert_array_equal(sums, [[4, 6, 6, 6], *[[6, 9, 9, 9]] * 3])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "side"), [(1, 8), (3, 8), (3, 7), (7, 9)])
def test_convolution_rounds_the_sides_up(size, side, stride):
    images = keras.Input((side, side, 3))
    assert layers.conv(images, 4, size, stride, name="c").shape[1] == -(-side // stride)


@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_local_response_normalization_is_the_formula_of_the_paper(policy, random):
    keras.config.set_dtype_policy(policy)
    activity = random.normal(0, 30, (2, 3, 3, 9))
    squares = np.pad(activity**2, ((0, 0), (0, 0), (0, 0), (2, 2)))
    around = sum(squares[..., i : i + 9] for i in range(5))
    got = layers.LocalResponseNormalization()(activity.astype(policy))
    assert got.dtype == policy
    np.testing.assert_allclose(got, activity / (2 + 1e-4 * around) ** 0.75, rtol=1e-5)


def test_local_response_normalization_keeps_its_numbers_in_a_file():
    layer = layers.LocalResponseNormalization(3, 1.0, 1e-3, 0.5, name="lrn")
    again = layers.LocalResponseNormalization.from_config(layer.get_config())
    assert (again.radius, again.bias, again.alpha, again.beta) == (3, 1.0, 1e-3, 0.5)
    assert again.name == "lrn"


# ---- GoogLeNet's auxiliary classifiers


def googlenet() -> models.Classifier:
    keras.utils.set_random_seed(0)
    return models.build("googlenet", (16, 16, 3), 10)


@pytest.fixture
def without_dropout(monkeypatch):
    monkeypatch.setattr(layers.Dropout, "call", lambda self, x, training=False: x)


@pytest.mark.usefixtures("without_dropout")
def test_googlenet_trains_its_auxiliary_classifiers_with_weight_three_tenths():
    images, labels = batch(4, (16, 16))
    model = googlenet()

    def gradients(weights):
        with tf.GradientTape() as tape:
            logits = model.logits_model(images, training=True)
            losses = [keras.losses.categorical_crossentropy(labels, x, True) for x in logits]
            loss = tf.add_n([w * tf.reduce_mean(x) for w, x in zip(weights, losses, strict=True)])
        return tape.gradient(loss, [v.value for v in variables])

    by_name = {layer.name: layer for layer in model.logits_model.layers}
    names = ("stem1_conv", "logits", "auxiliary1_logits", "auxiliary2_1x1_conv")
    variables = [by_name[name].kernel for name in names]
    expected = gradients([1.0, 0.3, 0.3])
    unweighted = gradients([1.0, 0.0, 0.0])
    before = [v.numpy() for v in variables]
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    one_step(model, images, labels)
    for variable, old, gradient in zip(variables, before, expected, strict=True):
        np.testing.assert_allclose(old - variable.numpy(), gradient, rtol=1e-3, atol=1e-5)
    # The auxiliary losses reach the stem: the comparison above would see another weight.
    assert np.abs(expected[0] - unweighted[0]).max() > 1e-3


@pytest.mark.usefixtures("without_dropout")
def test_googlenet_reports_the_loss_of_its_main_classifier_alone():
    images, labels = batch(4, (16, 16))
    model = googlenet()
    logits = model.logits_model(images, training=True)[0]
    expected = keras.losses.categorical_crossentropy(labels, logits, True).numpy().mean()
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    history = model.fit(images, labels, batch_size=4, verbose=0)
    assert history.history["loss"] == [pytest.approx(expected, rel=1e-5)]


def test_googlenet_deploys_and_saves_without_its_auxiliary_classifiers(tmp_path):
    model = googlenet()
    assert any("auxiliary" in v.path for v in model.logits_model.variables)
    network, path = model.deployable, tmp_path / "model.keras"
    network.save(path)
    for deployed in (network, models.load(path)):
        assert not any("auxiliary" in v.path for v in deployed.variables)
        assert not any("auxiliary" in layer.name for layer in deployed.layers)
        assert models.count_parameters(deployed) < models.count_parameters(model.logits_model)


# ---- Errors and files


def test_unknown_name_lists_the_choices():
    with pytest.raises(UsageError, match="unknown model 'resnet21'") as error:
        models.build("resnet21")
    assert all(name in str(error.value) for name in NAMES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [0, 2, 19, 21, 33, -4])
def test_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}$"):
        resnet_cifar.resnet_cifar(depth)


def test_any_depth_of_6n_plus_2_can_be_built():
    with keras.StatelessScope(initialize_variables=False):
        model = resnet_cifar.resnet_cifar(26)
        assert models.count_parameters(model.deployable) == resnet_cifar_size(26)
    assert model.name == "resnet26"


def test_load_of_a_missing_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist") as error:
        models.load(tmp_path / "model.keras")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_load_of_a_damaged_file_is_an_error_of_one_line(damage, tmp_path):
    path = tmp_path / "model.keras"
    models.build("lenet5").deployable.save(path)
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
    with pytest.raises(UserError, match="cannot be loaded") as error:
        models.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_load_refuses_a_model_that_carries_code(tmp_path):
    path = tmp_path / "model.keras"
    images = keras.Input((4, 4, 3))
    keras.Model(images, keras.layers.Lambda(lambda x: x + 1)(images)).save(path)
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(path)


# ---- Model files that would do something


def changed(path, change=None, files=None, **more) -> str:
    """Writes a model of which config.json or whole files are changed; why it is refused."""
    models.build("lenet5").deployable.save(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    if change:
        config = json.loads(contents["config.json"])
        change(config)
        contents["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w", more.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, value in (contents | (files or {})).items():
            archive.writestr(name, value)
    return refused(path)


def refused(path) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        models.load(path)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be loaded: ")
    assert message.isprintable()
    assert time.monotonic() - start < 5
    return message.removeprefix(f"{path} cannot be loaded: ")


def layer(config, kind: str) -> dict:
    return [x for x in config["config"]["layers"] if x["class_name"] == kind][-1]


def in_layer(**values):
    return lambda config: layer(config, "Dense").update(values)


def marshalled(made):
    """A Lambda layer whose function would make a file, as Keras stores it."""
    code = compile(f"open({str(made)!r}, 'w')", "x", "eval")
    stored = base64.b64encode(marshal.dumps(code)).decode()
    function = {"class_name": "__lambda__", "config": {"code": stored, "defaults": None}}
    return in_layer(
        module="keras.layers", class_name="Lambda", config={"name": "x", "function": function}
    )


def test_a_layer_with_code_is_refused_and_nothing_runs(tmp_path):
    assert "Lambda layer, which can run code" in changed(
        tmp_path / "m.keras", marshalled(tmp_path / "made")
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_layer(module="os", class_name="system", config="touch made"), "'os'"),
        (in_layer(module="subprocess", class_name="Popen", config={"args": "touch made"}), "'subp"),
        (in_layer(module="mine.of.it", class_name="Dense"), "'mine.of.it'"),
        (in_layer(registered_name="Other>Dense"), "'Other'"),
        (in_layer(class_name="TFSMLayer", config={"filepath": "/tmp/m"}), "TFSMLayer"),
        (in_layer(class_name="TextVectorization", config={"vocabulary": "/etc/passwd"}), "TextV"),
        (in_layer(module="keras.utils", class_name="get_file", config={"origin": "x"}), "get_file"),
        (lambda c: layer(c, "Dense")["config"].update(units=10**9), "bytes of weights"),
        (lambda c: layer(c, "Dense")["config"].update(units=-1), ""),
        (lambda c: layer(c, "Dense")["config"].update(activation={"module": "os"}), "'os'"),
        (lambda c: c.update(class_name="__typespec__", module="builtins"), "builtins"),
        (lambda c: c.clear(), ""),
    ],
    ids=["os", "popen", "module", "package", "saved_model", "vocabulary", "function", "memory",
         "negative", "activation", "typespec", "nothing"],
)  # fmt: skip
def test_a_configuration_that_names_something_else_is_refused(tmp_path, change, why, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in changed(tmp_path / "m.keras", change)
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "assets/x"])
def test_other_files_in_a_model_file_are_refused(tmp_path, name):
    assert "other files" in changed(tmp_path / "m.keras", files={name: b"x"})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_twice_is_refused(tmp_path):
    models.build("lenet5").deployable.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive:
        archive.writestr("config.json", b"{}")
    assert "other files" in refused(tmp_path / "m.keras")


def test_a_zip_bomb_is_refused(tmp_path):
    bomb = {"model.weights.h5": bytes(10_000_000)}
    path = tmp_path / "m.keras"
    assert "compressed" in changed(path, files=bomb, compression=zipfile.ZIP_DEFLATED)


def test_a_deeply_nested_configuration_is_refused(tmp_path):
    path = tmp_path / "m.keras"
    assert changed(path, files={"config.json": b"[" * 10**6})
    assert changed(path, files={"config.json": b'{"a":' * 900 + b"0" + b"}" * 900})


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "m.keras")
    assert "a pipe or a device" in refused(tmp_path / "m.keras")
