"""Our layers: what they compute, by which kernels, and where Keras's way is taken."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.models import classifier, layers, training_step
from tests.models.small import examples, kernels

# ---- Dropout


def ones(shape=(64, 8, 8, 16), dtype="float32") -> tf.Tensor:
    return tf.ones(shape, dtype)


def dropped(layer, x=None, calls: int = 1) -> np.ndarray:
    """bool [calls, ...]: what each call dropped of ones."""
    x = ones() if x is None else x
    call = tf.function(lambda: layer(x, training=True), autograph=False)
    return np.stack([call().numpy() == 0 for _ in range(calls)])


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_dropout_gives_its_input_back_in_inference_and_at_rate_0(rate, training):
    x = ones()
    assert layers.Dropout(rate)(x, training=training) is x


@pytest.mark.parametrize(
    ("rate", "shape", "policy", "tolerance"),
    [
        (0.3, (32, 8, 8, 16), "float32", 1e-6),
        (0.999, (32, 8, 8, 16), "float32", 1e-6),
        (0.3, (32, 8, 8, 6), "float64", 1e-12),
        (0.3, (32, 8, 8, 16), "float16", 1e-3),
        (0.5, (256, 128), "bfloat16", 1e-2),
    ],
)
def test_dropout_scales_what_it_keeps_and_zeroes_the_rest(rate, shape, policy, tolerance, random):
    layer = layers.Dropout(rate, seed=1, dtype=policy)
    x = tf.constant(random.uniform(1, 2, shape), policy)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    assert y.dtype == policy
    slope, x, y = (np.array(v, np.float64) for v in (tape.gradient(y, x), x, y))
    assert 0 < (y == 0).mean() < 1
    np.testing.assert_allclose(y, np.where(y == 0, 0, x / (1 - rate)), rtol=tolerance)
    np.testing.assert_allclose(slope, np.where(y == 0, 0, 1 / (1 - rate)), rtol=tolerance)


@pytest.mark.parametrize(
    ("rate", "shape"),
    [(rate, (64, 8, 8, 16)) for rate in (0.3, 0.001, 255 / 256)]  # 0.001: a quarter of 1 in 256
    + [(0.3, (64, 8, 8, 6)), (0.4, (512, 100)), (0.4, (512, 33)), (0.1, (4096,))],
)
def test_share_that_is_dropped_is_the_rate(rate, shape):
    calls = 100
    found = dropped(layers.Dropout(rate, seed=1), ones(shape), calls)
    # The threshold differs from call to call by up to 1 in 256, beside the elements' own chance.
    threshold = 1 / 256 / 2 / calls**0.5
    deviation = (rate * (1 - rate) / found.size) ** 0.5 + threshold
    assert found.mean() == pytest.approx(rate, abs=4 * deviation)
    assert found.any()
    assert not found.all()
    by_channel = found.reshape(-1, shape[-1]).mean(axis=0)
    spread = (rate * (1 - rate) * shape[-1] / found.size) ** 0.5 + threshold
    np.testing.assert_allclose(by_channel, rate, rtol=0, atol=6 * spread)


@pytest.mark.parametrize("channels", [16, 6])
def test_masks_differ_between_calls_and_come_again_with_the_seed(channels):
    x = ones((32, 8, 8, channels))
    one, same, other = (dropped(layers.Dropout(0.5, seed=s), x, calls=3) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    for mine, theirs in ((one[0], one[1]), (one[1], one[2]), (one, other)):
        assert (mine != theirs).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_neighbours_are_dropped_independently(rate):
    found = dropped(layers.Dropout(rate, seed=1), ones((16, 16, 16, 16)), calls=4).astype(float)
    for axis in range(found.ndim):
        for distance in (1, 2, 3):
            if distance < found.shape[axis]:
                mine = np.delete(found, range(distance), axis).ravel()
                theirs = np.delete(found, range(-distance, 0), axis).ravel()
                # Each of some 200,000 pairs.
                assert abs(np.corrcoef(mine, theirs)[0, 1]) < 0.015, (axis, distance)


def test_dropout_draws_one_word_for_four_elements_where_it_can():
    def drawn(rate, shape, **arguments) -> set:
        return kernels(layers.Dropout(rate, **arguments), shape) & words

    words = {"StatelessRandomUniformFullIntV2", "Bitcast"}
    assert drawn(0.3, (None, 8, 8, 16)) == drawn(0.3, (None, 512)) == words
    assert "Bitcast" not in drawn(0.3, (None, 8, 8, 6)) | drawn(0.3, (None, 8, 8, None))
    assert "Bitcast" not in drawn(0.999, (None, 8, 8, 16)) | drawn(0.3, (None,))


def test_noise_shape_is_broadcast_and_rate_1_is_kerass():
    found = dropped(layers.Dropout(0.5, (None, 1, 1, 16), seed=1))[0]
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1, :1], found.shape))
    assert found[:, 0, 0].mean() == pytest.approx(0.5, abs=0.08)
    assert dropped(layers.Dropout(1)).all()


@pytest.mark.parametrize("noise_shape", [(None, 1, 1, 1), (None, 1, 1, None), (8, 8, 16)])
def test_share_of_the_noise_that_is_dropped_is_the_rate(noise_shape):
    x, calls = tf.ones((512, 8, 8, 16)), 40
    found = dropped(layers.Dropout(0.3, noise_shape, seed=1), x, calls)
    for axis, size in enumerate(noise_shape, 4 - len(noise_shape)):
        if size == 1:
            first = np.take(found, [0], axis + 1)
            np.testing.assert_array_equal(found, np.broadcast_to(first, found.shape))
            found = first
    if len(noise_shape) == 3:  # one for all images
        found = found[:, :1]
    assert found.mean() == pytest.approx(0.3, abs=4 * (0.21 / found.size) ** 0.5 + 4e-4)
    assert len(np.unique(found.reshape(calls, -1), axis=0)) == calls


def test_dropout_compiled_by_xla_drops_the_same_elements():
    masks = []
    for xla in (False, True):
        layer = layers.Dropout(0.3, seed=1)
        call = tf.function(lambda x, f=layer: f(x, training=True), jit_compile=xla, autograph=False)
        masks.append([call(ones()).numpy() == 0 for _ in range(3)])
    np.testing.assert_array_equal(*masks)


# ---- Convolutions with a bias, the ends of networks


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("float32", 1e-5), ("float64", 1e-12), ("mixed_float16", 4e-3)]
)
@pytest.mark.parametrize("arguments", [{}, {"strides": 2, "activation": "tanh"}])
@pytest.mark.parametrize("kind", [layers.Convolution, layers.ConvBeforeNorm, layers.ConvWithBias])
def test_convolution_computes_what_conv2d_does(policy, tolerance, arguments, kind, random):
    keras.config.set_dtype_policy(policy)
    x = random.normal(0, 1, (2, 8, 8, 3)).astype("float32")
    kinds = (kind, keras.layers.Conv2D)
    ours, theirs = (kind(4, 3, name="conv", **arguments) for kind in kinds)
    for layer in (ours, theirs):
        layer.build(x.shape)
    ours.bias.assign([1.0, -2.0, 3.0, 0.0])
    theirs.set_weights(ours.get_weights())
    mine, other = ours(x), theirs(x)
    assert mine.dtype == other.dtype
    np.testing.assert_allclose(
        *(np.array(v, np.float64) for v in (mine, other)), tolerance, tolerance
    )


@pytest.fixture
def has_amx(monkeypatch):
    """Sets whether the CPU has AMX."""
    return lambda has: monkeypatch.setattr(layers.environment, "cpu_has", {"amx_bf16": has}.get)


@pytest.mark.parametrize(
    ("policy", "amx", "shape", "filters", "count"),
    [
        ("float32", False, (8, 2, 2, 256), 256, 8),
        ("float32", True, (8, 3, 2, 256), 256, 8),
        ("float32", True, (8, 2, 3, 512), 512, 1),
        ("float32", False, (8, 2, 2, 256), 255, 1),
        ("float32", False, (8, 1, 1, 128), 128, 8),
        ("mixed_bfloat16", False, (8, 4, 4, 512), 512, 1),
        ("mixed_bfloat16", True, (40, 4, 4, 128), 160, 8),
        ("mixed_bfloat16", True, (64, 4, 4, 128), 128, 16),
        ("mixed_bfloat16", True, (6, 8, 8, 256), 256, 2),
        ("mixed_bfloat16", True, (7, 8, 8, 256), 256, 1),
        ("mixed_bfloat16", True, (8, 8, 8, 255), 256, 1),
        ("mixed_bfloat16", True, (8, 8, 9, 288), 288, 1),
    ],
)
@pytest.mark.parametrize("size", [3, 5])
def test_narrow_images_are_convolved_side_by_side(
    policy, amx, shape, filters, count, size, has_amx, random
):
    keras.config.set_dtype_policy(policy)
    has_amx(amx)
    layer = layers.Convolution(filters, size, padding="same", bias_initializer="ones")
    layer.build(shape)
    dtype = layer.compute_dtype
    x, upstream = (
        tf.cast(random.normal(0, 1, (*shape[:3], depth)), dtype) for depth in (shape[3], filters)
    )

    @tf.function
    def outputs_and_gradients(training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=training)
        return outputs, *tape.gradient(outputs, (x, layer.kernel.value), upstream)

    graph = outputs_and_gradients.get_concrete_function(True).graph
    # It took an eighth to a sixth of the time of a step.
    assert "StridedSliceGrad" not in {op.type for op in graph.get_operations()}
    rows = [op.inputs[0].shape for op in graph.get_operations() if op.type == "Conv2D"]
    gap = size // 2 if count > 1 else 0
    assert rows == [(shape[0] // count, shape[1], count * (shape[2] + gap), shape[3])]
    got, expected = outputs_and_gradients(True), outputs_and_gradients(False)
    for ours, plain in zip(got, expected, strict=True):
        assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
        ours, plain = (np.array(values, np.float64) for values in (ours, plain))
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        assert np.linalg.norm(ours - plain) <= tolerance * np.linalg.norm(plain)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((None, 4, 4, 256), {}),
        ((8, None, 4, 256), {}),
        ((8, 4, 4, 256), {"data_format": "channels_first"}),
        ((8, 4, 4, 256), {"padding": "valid"}),
        ((8, 4, 4, 256), {"strides": 2}),
        ((8, 4, 4, 256), {"dilation_rate": 2}),
        ((8, 4, 4, 256), {"groups": 2}),
        ((8, 4, 4, 256), {"kernel_size": 2}),
        ((8, 4, 4, 256), {"kernel_size": 1}),
    ],
)
def test_other_convolutions_are_left_to_keras(shape, options, has_amx):
    has_amx(True)
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.Convolution(256, **{"kernel_size": 3, "padding": "same"} | options)
    layer.build(shape)

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def outputs(x):
        return layer(x, training=True)

    kinds = {op.type for op in outputs.get_concrete_function().graph.get_operations()}
    assert "Transpose" not in kinds


def test_prediction_leaves_narrow_images_as_they_are():
    """So that exports have plain convolutions, which every converter and runtime knows."""
    layer = layers.Convolution(256, 3, padding="same")
    layer.build((8, 2, 2, 256))
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec((8, 2, 2, 256))).graph
    assert "Transpose" not in {op.type for op in graph.get_operations()}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_gradient_of_a_bias_is_right_in_half_precision(policy, random):
    """Keras's Conv2D has BiasAddGrad, whose sums in bfloat16 stop growing on a CPU."""
    keras.config.set_dtype_policy(policy)
    x = random.normal(0, 1, (32, 32, 32, 3)).astype("float32")
    upstream = tf.random.stateless_normal((32, 32, 32, 4), (0, 0), 0.1)
    images = keras.Input((32, 32, 3))
    model = keras.Model(images, layers.conv(images, 4, 3, name="conv"))
    with tf.GradientTape() as tape:
        outputs = model(x)
        total = tf.reduce_sum(tf.cast(outputs, tf.float32) * upstream)
    bias = model.get_layer("conv").bias.value
    exact = tf.reduce_sum(tf.cast(tf.cast(upstream, outputs.dtype), tf.float32), (0, 1, 2))
    np.testing.assert_allclose(tape.gradient(total, bias), exact, rtol=2**-7)


@pytest.mark.parametrize(
    "name", ["airbench94", "alexnet", "googlenet", "lenet5", "nin", "resnet20"]
)
def test_the_ends_of_a_network_are_not_in_half_precision(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.build(name, (32, 32, 3), 10)
    compute = {layer.name: layer.compute_dtype for layer in model.layers}
    assert compute["scale"] == compute["logits"] == compute.get("whitening", "float32") == "float32"
    assert "bfloat16" in compute.values()
    outputs = training_step.compute_logits(
        model.logits_model, np.zeros((2, 32, 32, 3), np.uint8), training=True
    )
    assert {x.dtype for x in outputs} == {tf.float32}


@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_bfloat16"])
def test_gelu_is_the_formula_of_the_paper(policy, random):
    keras.config.set_dtype_policy(policy)
    layer = layers.SigmoidGelu()
    x = tf.cast(random.normal(0, 2, (2, 3, 3, 4)), layer.compute_dtype)
    exact = np.array(x, np.float64)
    exact /= 1 + np.exp(-1.702 * exact)
    got = layer(x)
    assert got.dtype == layer.compute_dtype
    tolerance = {"float32": 1e-6, "float64": 1e-12}.get(policy, 2**-8)
    np.testing.assert_allclose(np.array(got, np.float64), exact, tolerance, 1e-6)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_leaves_the_bias_before_a_norm_as_it_was(optimizer):
    images, x = classifier.image_input((8, 8, 3))
    x = layers.conv_norm(x, 4, 3, name="block", bias=True)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    model = classifier.Classifier.build_from(images, keras.layers.Dense(3)(x), "model")
    optimizer = getattr(keras.optimizers, optimizer)(0.1)
    model.compile(optimizer, weight_decay=0.1, run_eagerly=True)
    conv = model.get_layer("block_conv")
    assert isinstance(conv, layers.ConvBeforeNorm)
    conv.bias.assign([1.0, -2.0, 3.0, 0.0])
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.fit(*examples(4), batch_size=4, epochs=2, verbose=0)
    for variable in model.trainable_variables:
        moved = not np.array_equal(variable.numpy(), before[variable.path])
        assert moved == (variable is not conv.bias), variable.path


# ---- Shared blocks


def test_convolution_with_a_stride_pads_both_sides_alike():
    images = keras.Input((8, 8, 1))
    model = keras.Model(images, layers.conv(images, 1, 3, 2, name="c", bias=False))
    model.get_layer("c").kernel.assign(tf.ones((3, 3, 1, 1)))
    sums = model(np.ones((1, 8, 8, 1), np.float32)).numpy()[0, ..., 0]
    np.testing.assert_array_equal(sums, [[4, 6, 6, 6], *[[6, 9, 9, 9]] * 3])


@pytest.mark.parametrize("policy", ["float32", "float64", "bfloat16"])
def test_local_response_normalization_is_the_formula_of_the_paper(policy, random):
    keras.config.set_dtype_policy(policy)
    activity = random.normal(0, 30, (2, 3, 3, 9))
    squares = np.pad(activity**2, ((0, 0), (0, 0), (0, 0), (2, 2)))
    around = sum(squares[..., i : i + 9] for i in range(5))
    got = layers.LocalResponseNormalization()(tf.cast(activity, policy))
    assert got.dtype == policy
    tolerance = 2**-7 if policy == "bfloat16" else 1e-5
    got, exact = np.array(got, np.float64), activity / (2 + 1e-4 * around) ** 0.75
    np.testing.assert_allclose(got, exact, rtol=tolerance)


@pytest.mark.parametrize(
    "layer",
    [
        layers.BatchNormalization(0.8, 1e-2),
        layers.Dropout(0.3, seed=1),
        layers.Convolution(4, 3, 2, use_bias=False),
        layers.ConvBeforeNorm(4, 3, 2),
        layers.ConvWithBias(4, 3, 2),
        layers.LocalResponseNormalization(3, 1.0, 1e-3, 0.5),
        layers.Whitening(3),
        layers.SigmoidGelu(),
        layers.AddMirrored(),
        layers.MeanOfMirrored(),
        layers.AddMirrored(1),
        keras.layers.Conv2D(5, 3, kernel_initializer=layers.IdentityPlus(2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_are_themselves_after_a_file(layer, tmp_path, random):
    images = keras.Input((5, 6, 3))
    model = keras.Model(images, layer(images))
    x = random.normal(1, 2, (4, 5, 6, 3)).astype(np.float32)
    if layer.weights:
        model(x, training=True)  # changes the moving statistics
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path, compile=False, safe_mode=True)
    assert type(loaded.layers[1]) is type(layer)
    assert loaded.layers[1].get_config() == layer.get_config()
    trainable = [[v.trainable for v in m.weights] for m in (model, loaded)]
    assert trainable[0] == trainable[1]
    assert loaded.output_shape == model.output_shape
    for training in (True, False):
        np.testing.assert_array_equal(loaded(x, training=training), model(x, training=training))


# ---- Whitening, initial weights, mirror images


def smooth_images(random, count=64, side=12) -> np.ndarray:
    """Neighbouring pixels, and the channels of each, are alike, as in photographs."""
    images = random.normal(0, 1, (count, side, side, 1)).cumsum(axis=1).cumsum(axis=2)
    images = images + 0.2 * random.normal(0, 1, (count, side, side, 3))
    return (images / images.std()).astype(np.float32)


@pytest.mark.parametrize("size", [2, 3])
def test_whitened_patches_are_uncorrelated_and_of_variance_1(size, random):
    images, layer = smooth_images(random), layers.Whitening(size)
    before = layer(images)
    assert [v.name for v in layer.trainable_variables] == ["bias"]
    layer.adapt(images)
    outputs = np.asarray(layer(images), np.float64).reshape(-1, layer.filters)
    half = layer.filters // 2
    np.testing.assert_allclose(outputs[:, half:], -outputs[:, :half], atol=1e-4)
    moments = outputs[:, :half].T @ outputs[:, :half] / len(outputs)
    # Epsilon takes more of the smallest component.
    variances = np.diag(moments)
    assert variances.max() <= 1 + 1e-4
    assert variances.min() > 0.5
    np.testing.assert_allclose(moments - np.diag(variances), 0, atol=1e-3)
    assert np.abs(np.corrcoef(np.reshape(before, (-1, layer.filters))[:, :half].T)).max() > 0.5


@pytest.mark.parametrize(("channels", "filters"), [(4, 10), (10, 4)])
def test_first_filters_pass_their_channels_on(channels, filters, random):
    kernel = layers.IdentityPlus(seed=1)((3, 3, channels, filters), "float32")
    images = random.normal(0, 1, (2, 5, 6, channels)).astype(np.float32)
    outputs = tf.nn.conv2d(images, kernel, 1, "SAME").numpy()
    passed = min(channels, filters)
    np.testing.assert_array_equal(outputs[..., :passed], images[..., :passed])


def test_other_filters_are_pytorchs_default():
    kernel = np.asarray(layers.IdentityPlus(seed=1)((3, 3, 16, 512), "float32"))[..., 16:]
    assert np.abs(kernel).max() <= 1 / 12  # the square root of the fan-in
    assert kernel.var() == pytest.approx(1 / (3 * 9 * 16), rel=0.02)


def test_prediction_is_the_mean_of_an_image_and_its_mirror_image(random):
    images = keras.Input((4, 4, 3))
    inside = keras.layers.Dense(5, name="dense")
    x = keras.layers.Flatten()(layers.AddMirrored()(images))
    model = keras.Model(images, layers.MeanOfMirrored()(inside(x)))
    given = random.normal(0, 1, (3, 4, 4, 3)).astype(np.float32)
    plain, mirrored = (inside(np.reshape(x, (3, -1))).numpy() for x in (given, given[:, :, ::-1]))
    np.testing.assert_allclose(model(given, training=False), (plain + mirrored) / 2, atol=1e-6)
    np.testing.assert_allclose(model(given, training=True), plain, atol=1e-6)
    assert np.abs(plain - mirrored).max() > 0.1


def test_six_views_are_moved_by_a_pixel_up_and_down_the_diagonal(random):
    images = keras.Input((4, 5, 3))
    inside = keras.layers.Dense(5, name="dense")
    x = keras.layers.Flatten()(layers.AddMirrored(1)(images))
    model = keras.Model(images, layers.MeanOfMirrored(1)(inside(x)))
    given = random.normal(0, 1, (3, 4, 5, 3)).astype(np.float32)
    padded = np.pad(given, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    shares = ((1 / 4, given), (1 / 8, padded[:, :4, :5]), (1 / 8, padded[:, 2:, 2:]))
    expected = sum(
        share * inside(np.reshape(form, (3, -1))).numpy()
        for share, view in shares
        for form in (view, view[:, :, ::-1])
    )
    np.testing.assert_allclose(model(given, training=False), expected, atol=1e-6)
    plain = inside(np.reshape(given, (3, -1))).numpy()
    np.testing.assert_allclose(model(given, training=True), plain, atol=1e-6)
