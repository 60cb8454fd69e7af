"""The networks: their sizes, their layers, and that each one trains, saves and loads."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.models import applications, resnet_cifar

# tests/models/test_applications.py has the others.
NAMES = tuple(name for name in models.variants() if name not in applications.VARIANTS)
ALL_BUT_DEEPEST = tuple(name for name in NAMES if name != "resnet1202")
# The others differ from these in the number of layers alone.
QUICK = ("alexnet", "airbench_deep", "airbench_small", "efficientnet_lite0", "googlenet",
         "googlenet_bn", "lenet5", "nin", "resnet18", "resnet20", "resnet50", "vgg11", "vgg11_bn",
         "vgg_bn_drop")  # fmt: skip
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@functools.cache
def skeleton(name: str, shape: tuple = (32, 32, 3), classes: int = 10) -> models.Classifier:
    """The network without the memory of its weights."""
    with keras.StatelessScope(initialize_variables=False):
        return models.build(name, shape, classes)


# ---- Sizes

# Those of ImageNet's networks are torchvision's and Caffe's; those of resnet20 to resnet1202 follow
# from section 4.2 of the paper, with shortcuts of option B.
PARAMETERS = {
    "alexnet": 60_965_224, "googlenet": 6_998_552, "googlenet_bn": 7_013_112,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
    "resnet101": 44_549_160, "resnet152": 60_192_808, "vgg11": 132_863_336,
    "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240, "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736, "vgg16_bn": 138_365_992, "vgg19_bn": 143_678_248,
    "resnet20": 272_474, "resnet32": 466_906, "resnet44": 661_338, "resnet56": 855_770,
    "resnet110": 1_730_714, "resnet1202": 19_424_026, "nin": 966_986, "lenet5": 62_006,
    "efficientnet_lite0": 4_652_008, "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072, "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568, "vgg_bn_drop": 15_254_602,
    "airbench_small": 568_728, "airbench94": 1_971_352, "airbench95": 4_604_440,
    "airbench_small_views": 568_728, "airbench94_views": 1_971_352, "airbench95_views": 4_604_440,
    "airbench_deep": 6_950_616, "airbench_deep_views": 6_950_616,
}  # fmt: skip
MULTIPLY_ADDS = {
    "resnet18": (1.81e9, 0.01e9),
    "vgg16": (15.47e9, 0.01e9),
    "resnet20": (40.8e6, 0.05e6),
    # By hand: 28 x 28 x 6 x 75, 10 x 10 x 16 x 150, and the dense layers.
    "lenet5": (352_800 + 240_000 + 48_000 + 10_080 + 840, 0),
}


# Of weights that were trained elsewhere, where it is not ours.
EPSILON = {f"efficientnet_lite{number}": 1e-3 for number in range(5)}


@pytest.mark.parametrize(
    "name", [*ALL_BUT_DEEPEST, pytest.param("resnet1202", marks=pytest.mark.slow)]
)
def test_sizes_are_the_documented_ones(name):
    variant = models.variants()[name]
    found, size, parameters, multiply_adds, paper = models.describe(name)
    assert (found, size, paper) == (name, variant.image_size, variant.paper)
    assert parameters == PARAMETERS[name]
    if name in MULTIPLY_ADDS:
        expected, tolerance = MULTIPLY_ADDS[name]
        assert multiply_adds == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "parameters"), [("googlenet", 13_378_280), ("googlenet_bn", 13_393_352)]
)
def test_googlenet_trains_two_auxiliary_classifiers_that_are_not_deployed(name, parameters):
    model = skeleton(name, (224, 224, 3), 1000)
    assert models.count_parameters(model.logits_model) == parameters
    assert len(model.logits_model.outputs) == 3
    assert not any("auxiliary" in layer.name for layer in model.deployable.layers)


# ---- Every network


@pytest.mark.parametrize("name", EACH)
def test_trains_saves_and_loads(name, tmp_path):
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    labels = np.eye(10, dtype=np.float32)[:2]
    model = models.build(name)
    model.compile("sgd", run_eagerly=True)
    before = {v.path: v.numpy() for v in model.logits_model.trainable_variables if len(v.shape) > 1}
    model.fit(images, labels, batch_size=2, verbose=0)
    for variable in model.logits_model.trainable_variables:
        if variable.path in before:
            assert not np.array_equal(variable.numpy(), before[variable.path]), variable.path

    # Without statistics of its own, a network of 1,202 layers overflows.
    model.recompute_statistics(iter([(images, labels)]), 1)
    network, path = model.deployable, tmp_path / "model.keras"
    network.save(path)
    loaded = models.load(path)
    path.unlink()
    expected, got = (m(images, training=False).numpy() for m in (network, loaded))
    assert expected.shape == (2, 10)
    assert expected.min() >= 0
    np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert not any("auxiliary" in variable.path for variable in loaded.variables)


@pytest.fixture(scope="module", params=ALL_BUT_DEEPEST)
def smallest(request) -> models.Classifier:
    """Each network for the smallest images that it takes."""
    side = models.variants()[request.param].min_size
    return skeleton(request.param, (side, side, 3))


def test_builds_at_its_smallest_size_and_refuses_a_smaller_one(smallest):
    side = models.variants()[smallest.name].min_size
    assert smallest.input_shape == (None, side, side, 3)
    assert smallest.output_shape == (None, 10)
    for height, width in ((side - 1, side), (side, side - 1)):
        with pytest.raises(UserError, match=f"at least {side} x {side} pixels") as error:
            models.build(smallest.name, (height, width, 3), 10)
        assert "\n" not in str(error.value)
        assert f"{width} x {height}" in str(error.value)


def test_layers_that_others_rely_on(smallest):
    names = [layer.name for layer in smallest.deployable.layers]
    assert names.count("features") == 1
    assert names.index("features") < names.index("logits")
    assert names[-1] == "probabilities"
    assert smallest.get_layer("features").output.shape[-1] > 10
    kind = models.layers.BatchNormalization
    norms = [layer for layer in smallest.logits_model.layers if isinstance(layer, kind)]
    assert {(norm.momentum, norm.epsilon) for norm in norms} <= {
        (0.9, EPSILON.get(smallest.name, 1e-5))
    }
    assert bool(norms) == (
        smallest.name.startswith(("resnet", "air", "efficient")) or "_bn" in smallest.name
    )


@pytest.mark.parametrize("name", QUICK)
def test_takes_images_that_are_not_square(name):
    assert skeleton(name, (32, 48, 3), 7).output_shape == (None, 7)


# ---- Layer by layer


def outline(model: keras.Model) -> list:
    """(Keras's layer that it is a kind of, its filters, units or rate)."""
    number = {"Conv2D": "filters", "Dense": "units", "Dropout": "rate"}
    kinds = []
    for layer in model.layers:
        kind = next(c.__name__ for c in type(layer).mro() if c.__module__.startswith("keras.src"))
        kinds.append((kind, getattr(layer, number.get(kind, ""), None)))
    return kinds


def test_vgg_bn_drop_is_the_tutorials_sequence_of_layers():
    expected = [("InputLayer", None), ("Rescaling", None)]
    for count, filters in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        rate = 0.3 if filters == 64 else 0.4
        block = [("Conv2D", filters), ("BatchNormalization", None), ("ReLU", None)]
        expected += [*block, ("Dropout", rate)] * (count - 1) + block + [("MaxPooling2D", None)]
    hidden = [("Dense", 512), ("BatchNormalization", None), ("ReLU", None), ("Dropout", 0.5)]
    expected += [("Flatten", None), ("Dropout", 0.5), *hidden]
    expected += [("Dense", 512), ("Dense", 10), ("Activation", None)]
    assert outline(skeleton("vgg_bn_drop").deployable) == expected


@pytest.mark.parametrize(
    ("name", "side", "layer", "kernel", "stride"),
    [
        ("resnet18", 64, "stem_conv", 3, 1),
        ("resnet18", 65, "stem_conv", 7, 2),
        ("alexnet", 64, "conv1_conv", 5, 1),
        ("alexnet", 224, "conv1_conv", 11, 4),
        ("googlenet", 64, "stem1_conv", 3, 1),
        ("googlenet", 224, "stem1_conv", 7, 2),
        # As in torchvision, the 3 x 3 convolution of a bottleneck has the stride.
        ("resnet50", 32, "stage1_block0_1_conv", 1, 1),
        ("resnet50", 32, "stage1_block0_2_conv", 3, 2),
        ("resnet50", 32, "stage1_block0_3_conv", 1, 1),
    ],
)
def test_stems_and_bottlenecks_have_the_documented_convolutions(name, side, layer, kernel, stride):
    found = skeleton(name, (side, side, 3)).get_layer(layer)
    assert (found.kernel_size, found.strides) == ((kernel, kernel), (stride, stride))


@pytest.mark.parametrize(
    ("name", "side", "layer", "shape"),
    [
        ("resnet18", 64, "stage3_block1_relu", (8, 8, 512)),
        ("resnet18", 224, "stage3_block1_relu", (7, 7, 512)),
        ("googlenet", 32, "inception3a_concat", (16, 16, 256)),
        ("googlenet", 32, "inception5b_concat", (4, 4, 1024)),
        ("googlenet", 224, "inception3a_concat", (28, 28, 256)),
        ("alexnet", 224, "conv1_conv", (55, 55, 96)),
        ("alexnet", 224, "conv2_concat", (27, 27, 256)),
        ("alexnet", 224, "flatten", (6 * 6 * 256,)),
    ],
)
def test_maps_have_the_documented_shapes(name, side, layer, shape):
    assert skeleton(name, (side, side, 3)).get_layer(layer).output.shape == (None, *shape)


def test_the_last_two_convolutions_of_a_deep_group_are_a_residual_block(random):
    model = models.build("airbench_deep", (16, 16, 3), 3)
    model.get_layer("group1_3_conv").kernel.assign(tf.zeros((3, 3, 384, 384)))
    layers = ("group1_1_gelu", "group1_3_gelu")
    network = keras.Model(model.inputs[0], [model.get_layer(name).output for name in layers])
    before, after = network(random.integers(0, 256, (2, 16, 16, 3), np.uint8))
    # Without the convolution the block is its shortcut, to which GELU is applied.
    np.testing.assert_allclose(after, before * tf.sigmoid(1.702 * before), rtol=1e-5, atol=1e-6)


# ---- Errors


def test_unknown_name_lists_the_choices():
    with pytest.raises(UsageError, match="unknown model 'resnet21'") as error:
        models.build("resnet21")
    assert all(name in str(error.value) for name in NAMES)
    assert "\n" not in str(error.value)


def test_depths_of_6n_plus_2_can_be_built_and_others_are_refused():
    with keras.StatelessScope(initialize_variables=False):
        model = resnet_cifar.resnet_cifar(26)
    assert models.count_parameters(model.deployable) == 369_690
    assert model.name == "resnet26"
    for depth in (2, 19, 33, -4):
        with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}$"):
            resnet_cifar.resnet_cifar(depth)
