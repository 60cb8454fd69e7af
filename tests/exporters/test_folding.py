"""Folding batch normalization: what is folded, what is not, and equal outputs."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.exporters import folding, saved_model

# One network without normalization, and one for each way to use it.
SLOW = pytest.param("resnet50", marks=pytest.mark.slow)
NAMES = ("googlenet", "googlenet_bn", "resnet20", SLOW, "vgg_bn_drop")


def images(count: int = 8, side: int = 32) -> np.ndarray:
    """uint8 [count, side, side, 3]: smooth, as photographs are."""
    noise = np.random.default_rng(3).uniform(0, 255, (count, 4, 4, 3))
    return tf.cast(tf.image.resize(noise, (side, side), "bicubic"), tf.uint8).numpy()


def trained(name: str) -> keras.Model:
    """A network with scales, offsets and statistics as training leaves them."""
    keras.utils.set_random_seed(1)
    model = models.build(name, (32, 32, 3), 10)
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name in ("gamma", "beta", "bias"):
            low = 0.3 if variable.name == "gamma" else -0.5
            variable.assign(random.uniform(low, low + 1, variable.shape))
    model.compile()
    model.recompute_statistics(iter([(images(64),)]), 1)
    return model.deployable


def norms(model: keras.Model) -> int:
    return sum(isinstance(x, keras.layers.BatchNormalization) for x in model.layers)


def outputs(model: keras.Model, *names: str) -> list[np.ndarray]:
    wanted = [model.get_layer(name).output for name in names]
    return [np.asarray(x) for x in keras.Model(model.inputs[0], wanted)(images(), training=False)]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_the_same_without_normalization(name):
    model = trained(name)
    folded = folding.fold(model, kept="features")
    assert norms(folded) == 0
    assert [x.name for x in folded.layers] == [x.name for x in model.layers]
    wanted = ("probabilities", "logits", "features")
    before, after = outputs(model, *wanted), outputs(folded, *wanted)
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())
    assert np.ptp(before[1], axis=0).max() > 1e-3  # The outputs depend on the images.


def test_the_model_itself_is_not_changed():
    model = trained("resnet20")
    before, count = [w.copy() for w in model.get_weights()], norms(model)
    first, second = folding.fold(model), folding.fold(model)
    assert norms(model) == count > 0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for one, two in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not any(w is v for w in model.weights for v in first.weights)


@keras.saving.register_keras_serializable("test_folding")
class OwnNormalization(keras.layers.BatchNormalization):
    """A subclass with the same weights, as `layers.BatchNormalization` is."""


L = keras.layers
X = keras.Input((6, 6, 4), name="x")
FOLDED = {
    "convolution": lambda x: L.BatchNormalization()(L.Conv2D(5, 3)(x)),
    "no bias": lambda x: L.BatchNormalization()(L.Conv2D(5, 3, use_bias=False)(x)),
    "groups": lambda x: L.BatchNormalization()(L.Conv2D(6, 3, groups=2)(x)),
    "depthwise": lambda x: L.BatchNormalization()(L.DepthwiseConv2D(3)(x)),
    "depthwise, no bias": lambda x: L.BatchNormalization()(L.DepthwiseConv2D(3, use_bias=False)(x)),
    "several a channel": lambda x: L.BatchNormalization()(
        L.DepthwiseConv2D(3, depth_multiplier=2)(x)
    ),
    "separable": lambda x: L.BatchNormalization()(L.SeparableConv2D(5, 3, use_bias=False)(x)),
    "dense": lambda x: L.BatchNormalization()(L.Dense(5)(L.Flatten()(x))),
    "dense on maps": lambda x: L.BatchNormalization()(L.Dense(5, use_bias=False)(x)),
    "no scale": lambda x: L.BatchNormalization(scale=False)(L.Conv2D(5, 3)(x)),
    "no offset": lambda x: L.BatchNormalization(center=False)(L.Conv2D(5, 3)(x)),
    "axis 3": lambda x: L.BatchNormalization(axis=3)(L.Conv2D(5, 3)(x)),
    "subclass": lambda x: OwnNormalization()(L.Conv2D(5, 3)(x)),
    "slice": lambda x: L.BatchNormalization()(L.Conv2D(5, 3)(x[..., :2])),
}


def shared_convolution(x):
    conv = L.Conv2D(4, 3, padding="same")
    return L.BatchNormalization()(conv(conv(x)))


def shared_normalization(x):
    norm = L.BatchNormalization()
    return norm(L.Conv2D(4, 1)(norm(L.Conv2D(4, 1)(x))))


def used_twice(x):
    y = L.Conv2D(4, 1)(x)
    return L.Add()([y, L.BatchNormalization()(y)])


KEPT = {
    "shared convolution": shared_convolution,
    "shared normalization": shared_normalization,
    "used twice": used_twice,
    "activation between": lambda x: L.BatchNormalization()(L.Conv2D(4, 1, activation="relu")(x)),
    "the input": lambda x: L.BatchNormalization()(x),
    "pooling": lambda x: L.BatchNormalization()(L.MaxPooling2D(2)(x)),
    "an operation": lambda x: L.BatchNormalization()(x[..., :2]),
    "transposed": lambda x: L.BatchNormalization()(L.Conv2DTranspose(3, 3)(x)),
    "rows": lambda x: L.BatchNormalization(axis=1)(L.Conv2D(6, 1)(x)),
    "batch statistics": lambda x: L.BatchNormalization()(L.Conv2D(4, 1)(x), training=True),
    "asked for": lambda x: L.BatchNormalization()(L.Conv2D(4, 1, name="features")(x)),
}


def network(build) -> keras.Model:
    """A model of X with random weights, and statistics that are no identity."""
    model = keras.Model(X, build(X))
    random = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(random.uniform(0.2, 1.5, variable.shape))
    return model


def same(model: keras.Model, folded: keras.Model):
    x = np.random.default_rng(1).normal(size=(3, 6, 6, 4)).astype(np.float32)
    expected = np.asarray(model(x, training=False))
    np.testing.assert_allclose(folded(x, training=False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FOLDED)
def test_normalization_after_a_linear_layer_is_folded(case):
    model = network(FOLDED[case])
    folded = folding.fold(model)
    assert (norms(model), norms(folded)) == (1, 0)
    same(model, folded)


@pytest.mark.parametrize("case", KEPT)
def test_other_normalization_stays(case):
    model = network(KEPT[case])
    folded = folding.fold(model, kept="features")
    assert norms(folded) == norms(model) > 0
    same(model, folded)


def test_a_convolution_that_another_model_uses_too_is_folded():
    conv = L.Conv2D(4, 1)
    y = conv(X)
    keras.Model(X, L.ReLU()(y))  # as an auxiliary classifier that is not deployed
    conv(keras.Input((6, 6, 4)))
    normalized = L.BatchNormalization()(y)
    assert norms(folding.fold(keras.Model(X, normalized))) == 0
    # But not where it is an output itself.
    assert norms(folding.fold(keras.Model(X, [y, normalized]))) == 1


def test_an_extreme_scale_is_folded_in_double_precision():
    model = network(FOLDED["convolution"])
    model.layers[-1].moving_variance.assign(np.float32([1e-12, 1e-4, 1, 1e4, 1e8]))
    folded = folding.fold(model)
    x = np.random.default_rng(1).normal(size=(3, 6, 6, 4)).astype(np.float32)
    expected, got = (m(x, training=False).numpy() for m in (model, folded))
    scale = np.abs(expected).max((0, 1, 2))
    assert (np.abs(got - expected).max((0, 1, 2)) <= 1e-5 * scale).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_precision_model_is_folded_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    model = trained("resnet20")
    folded = folding.fold(model)
    assert norms(folded) == 0
    assert folded.inputs[0].dtype == "uint8"
    assert {layer.compute_dtype for layer in folded.layers[1:]} == {"float32"}
    before, after = (m(images(), training=False).numpy() for m in (model, folded))
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=0.1)


def test_double_precision_stays():
    keras.config.set_dtype_policy("float64")
    folded = folding.fold(trained("resnet20"))
    assert folded.get_layer("stem_conv").compute_dtype == "float64"


# ---- Kernels


def executed(path, signature: str, feed) -> list[str]:
    """The operations that TensorFlow executes for a signature, after all its optimizations."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        definition = meta.signature_def[signature]
        (given,) = (x.name for x in definition.inputs.values())
        wanted = [x.name for x in definition.outputs.values()]
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        metadata = tf.compat.v1.RunMetadata()
        session.run(wanted, {given: feed}, options, metadata)
    return [node.op for graph in metadata.partition_graphs for node in graph.node]


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("resnet20", "serving_default"),
        ("resnet20", "serving_bytes"),
        ("resnet20", "features"),
        ("vgg_bn_drop", "serving_default"),
        pytest.param("googlenet_bn", "serving_default", marks=pytest.mark.slow),
    ],
)
def test_the_exported_network_runs_fused_kernels_only(name, signature, exported):
    path = exported(name)
    feed = images() if signature != "serving_bytes" else [tf.io.encode_png(images()[0]).numpy()]
    ops = executed(path, signature, feed)
    convolutions = sum(isinstance(x, L.Conv2D) for x in models.build(name).deployable.layers)
    # `_FusedConv2D`, or with oneDNN `_MklNativeFusedConv2D` and `_MklNativePadWithFusedConv2D`.
    assert sum("FusedConv2D" in op for op in ops) == convolutions
    left = {"Conv2D", "_MklNativeConv2D", "BiasAdd", "Rsqrt", "SquaredDifference"}
    assert not left & set(ops)
    assert not any("BatchNorm" in op for op in ops)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a network, each once."""
    base = tmp_path_factory.mktemp("folding")
    return functools.cache(
        lambda name: saved_model.export(trained(name), base / name, tuple("abcdefghij"))
    )


def test_an_export_stores_each_folded_weight_once(exported):
    path = exported("vgg_bn_drop")
    stored = dict(tf.train.list_variables(str(path / "variables" / "variables")))
    weights = [shape for name, shape in stored.items() if name.startswith("weights/")]
    model = models.build("vgg_bn_drop").deployable
    kernels = [v.shape for v in model.weights if v.path.endswith(("/kernel", "/bias"))]
    assert sorted(map(tuple, weights)) == sorted(map(tuple, kernels))
    # The graph holds no weights: they are variables.
    assert (path / "saved_model.pb").stat().st_size < 500_000
