"""Learning rates at points computed by hand, and what each optimizer does to the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.config import OptimizerConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.models import classifier, layers
from keras_cifar.training import optimizers
from keras_cifar.training.optimizers import Schedule

# ---- Schedules


@pytest.mark.parametrize(
    ("kind", "warmup", "milestones", "points"),
    [
        ("constant", 0, (), {0: 1, 50: 1, 99: 1}),
        ("constant", 10, (), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        ("cosine", 0, (), {0: 1, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 75: (1 - 0.5**0.5) / 2, 100: 0}),
        ("linear", 0, (), {0: 1, 25: 0.75, 50: 0.5, 100: 0}),
        ("linear", 20, (), {0: 0.05, 19: 1, 20: 1, 60: 0.5, 100: 0, 110: 0}),
        ("cosine", 20, (), {0: 0.05, 9: 0.5, 19: 1, 20: 1, 60: 0.5, 100: 0, 110: 0}),
        ("step", 0, (0.5, 0.75), {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
        ("step", 0, (0.3, 0.57, 0.7), {29: 1, 30: 0.1, 56: 0.1, 57: 0.01, 69: 0.01, 70: 0.001}),
        ("step", 10, (0.05, 0.75), {4: 0.5, 5: 0.06, 9: 0.1, 74: 0.1, 75: 0.01}),
        ("onecycle", 0, (), {0: 0.04, 15: 0.52, 30: 1, 65: 0.5, 100: 0}),
        ("onecycle", 50, (), {0: 0.04, 25: 0.52, 50: 1, 75: 0.5, 100: 0}),
    ],
)
def test_rate_at_points_computed_by_hand(kind, warmup, milestones, points):
    schedule = Schedule(kind, 0.2, 100, warmup, milestones)
    for step, share in points.items():
        got = float(schedule(tf.constant(step, tf.int64)))
        assert got == pytest.approx(0.2 * share, rel=1e-4, abs=1e-8), step


@pytest.mark.parametrize(
    "schedule",
    [Schedule("onecycle", 0.2, 100, 7), Schedule("step", 0.2, 100, 7, (0.3, 0.6))],
    ids=["onecycle", "step"],
)
def test_schedule_can_be_written_and_read(schedule):
    text = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(text)
    assert [float(again(s)) for s in range(100)] == [float(schedule(s)) for s in range(100)]


# ---- Flags


@pytest.mark.parametrize(
    ("text", "milestones"),
    [("constant", ()), ("onecycle", ()), ("step(0.5, 0.75)", (0.5, 0.75)), ("step(0.1)", (0.1,))],
)
def test_flag_gives_kind_and_milestones(text, milestones):
    assert optimizers.parse_schedule(text) == (text.partition("(")[0], milestones)


@pytest.mark.parametrize("text", ["exponential", "", "Cosine", "step(0.5", "step(0.5))x"])
def test_unknown_schedule_lists_the_choices(text):
    with pytest.raises(UsageError) as error:
        optimizers.parse_schedule(text)
    message = str(error.value)
    assert message.startswith(f"unknown schedule {text!r}; choose one of: constant, cosine, linear")
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    ["step", "step()", "step(0.5,0.5)", "step(0.75,0.5)", "step(0,0.5)", "step(0.5,1)",
     "step(half)", "step(0.5,)", "step(nan)", "step(inf)", "cosine(0.5)", "constant(1)"],
)  # fmt: skip
def test_milestones_that_are_not_increasing_fractions_are_refused(text):
    with pytest.raises(UsageError) as error:
        optimizers.parse_schedule(text)
    message = str(error.value)
    assert message.startswith(f"--lr_schedule={text}: step takes increasing fractions")
    assert "\n" not in message


def test_schedule_counts_epochs_in_steps():
    config = OptimizerConfig(learning_rate=0.2, lr_schedule="step(0.5,0.75)", warmup_epochs=1.5)
    assert optimizers.schedule(config, 10, 20).get_config() == {
        "kind": "step",
        "peak": 0.2,
        "total_steps": 200,
        "warmup_steps": 30,
        "milestones": (0.5, 0.75),
    }


@pytest.mark.parametrize("warmup", [10.0, 11.0])
def test_warmup_that_never_ends_is_refused(warmup):
    config = OptimizerConfig(warmup_epochs=warmup)
    with pytest.raises(UsageError, match=rf"^--warmup_epochs={warmup} must be below --epochs=10$"):
        optimizers.schedule(config, 10, 20)


def test_warmup_may_fill_all_but_the_last_step():
    config = OptimizerConfig(warmup_epochs=9.95, lr_schedule="cosine", learning_rate=1)
    rates = [float(optimizers.schedule(config, 10, 20)(step)) for step in (0, 198, 199)]
    assert rates == pytest.approx([1 / 199, 1, 1])


# ---- Optimizers


def model(epochs=10, start=0, **flags) -> classifier.Classifier:
    """A compiled network of two kernels, two biases and BN; two layers are frozen before `start`."""
    keras.utils.set_random_seed(0)
    images, x = classifier.image_input((4, 4, 3))
    x = layers.conv_norm(x, 4, 3, name="conv", bias=True)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    logits = keras.layers.Dense(3, name="logits")(x)
    built = classifier.Classifier.build_from(images, logits, "model")
    config = OptimizerConfig(**flags)
    rate = optimizers.schedule(config, epochs, 10)
    late = [built.get_layer(name) for name in ("conv_conv", "conv_bn")] if start else []
    optimizers.compile_model(built, config, rate, late, start, jit_compile=False)
    return built


def move(network, gradient: float, steps: int = 1) -> dict[str, tuple]:
    """{path: (before, after)} of steps with the same gradient for every weight."""
    variables = network.trainable_variables
    before = [v.numpy() for v in variables]
    for _ in range(steps):
        gradients = [tf.fill(v.shape, gradient) for v in variables]
        network.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return {v.path: (old, v.numpy()) for v, old in zip(variables, before, strict=True)}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Muon"])
def test_flags_choose_the_optimizer_and_its_rate(name):
    network = model(optimizer=name.lower(), learning_rate=0.02)
    assert type(network.optimizer) is getattr(optimizers, name)
    for path, (before, after) in move(network, gradient=1.0).items():
        if name == "Muon" and before.ndim == 4:
            continue
        np.testing.assert_allclose(before - after, 0.02, atol=1e-6, err_msg=path)


def test_rate_follows_the_schedule_step_by_step():
    flags = {"lr_schedule": "cosine", "learning_rate": 0.5, "warmup_epochs": 0.2}
    network = model(epochs=1, optimizer="sgd", momentum=0.0, **flags)
    expected = optimizers.Schedule("cosine", 0.5, 10, 2)
    for step in range(10):
        for before, after in move(network, gradient=1.0).values():
            np.testing.assert_allclose(before - after, float(expected(step)), atol=1e-6)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "steps"), [(0.0, False, 2), (0.9, False, 2.9), (0.5, True, 1.5 + 1.75)]
)
def test_momentum_of_sgd_adds_the_last_step_and_nesterov_looks_ahead(momentum, nesterov, steps):
    network = model(optimizer="sgd", learning_rate=0.1, momentum=momentum, nesterov=nesterov)
    for before, after in move(network, gradient=1.0, steps=2).values():
        np.testing.assert_allclose(before - after, 0.1 * steps, atol=1e-6)


def test_bias_rate_is_of_biases_and_normalization_alone():
    network = model(optimizer="sgd", learning_rate=0.01, bias_rate=8.0)
    for before, after in move(network, gradient=1.0).values():
        factor = 1 if before.ndim > 1 else 8
        np.testing.assert_allclose(before - after, 0.01 * factor, atol=1e-6)


@pytest.mark.parametrize("shape", [(27, 16), (16, 27), (9, 9)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_singular_values(shape, random):
    matrix = random.normal(0, 1, shape)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ optimizers.orthogonal(tf.constant(matrix)).numpy() @ right.T
    values = np.diag(inside)
    np.testing.assert_allclose(inside, np.diag(values), atol=1e-9)
    assert values.max() < 1.25
    assert np.sort(values)[1] > 0.4  # the smallest of a square matrix may be near 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_steps_along_an_orthogonal_matrix_from_filters_of_norm_1(nesterov, random):
    flags = {
        "momentum": 0.5,
        "nesterov": nesterov,
        "layer_decay": 0.5**0.25,
    }  # 1/8 in the first layer
    network = model(optimizer="muon", learning_rate=0.8, **flags)
    kernel = network.get_layer("conv_conv").kernel  # 3 x 3 x 3 x 4
    value, momentum = kernel.numpy().astype(np.float64), 0.0
    for _ in range(3):
        gradient = random.normal(0, 1, kernel.shape)
        momentum = 0.5 * momentum + gradient
        update = gradient + 0.5 * momentum if nesterov else momentum
        step = optimizers.orthogonal(tf.constant(update.reshape(27, 4))).numpy()
        value = 2 * value / np.linalg.norm(value) - 0.1 * step.reshape(value.shape)
        gradients = [
            tf.constant(gradient, tf.float32) if v is kernel else tf.zeros(v.shape)
            for v in network.trainable_variables
        ]
        network.optimizer.apply(gradients, network.trainable_variables)
        np.testing.assert_allclose(kernel.numpy(), value, atol=1e-5)


def test_muon_leaves_depthwise_filters_to_sgd():
    kernel = keras.Variable(np.ones((3, 3, 4, 1)), name="kernel")
    for kind in (optimizers.SGD, optimizers.Muon):
        kernel.assign(np.ones((3, 3, 4, 1)))
        optimizer = kind(0.1, 0.9)
        optimizer.apply([tf.fill(kernel.shape, 0.5)], [kernel])
        np.testing.assert_allclose(kernel.numpy(), 0.95, rtol=1e-6)


def test_muon_needs_normalization():
    lenet5 = models.build("lenet5", (32, 32, 3), 10)
    config = OptimizerConfig(optimizer="muon")
    with pytest.raises(UsageError, match=r"^--optimizer=muon .* lenet5 has none; use adam, adamw"):
        optimizers.compile_model(lenet5, config, optimizers.schedule(config, 1, 10))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_rates_fall_from_the_last_layer_to_the_first(name):
    network = model(optimizer=name, learning_rate=0.01, layer_decay=0.9, head_rate=10.0)
    factors = {"conv_conv": 0.9**12, "conv_bn": 0.9**6, "logits": 10}
    for path, (before, after) in move(network, gradient=1.0).items():
        expected = 0.01 * factors[path.split("/")[-2]]
        np.testing.assert_allclose(before - after, expected, rtol=1e-3, err_msg=path)


def test_rates_of_a_network_whose_first_layers_are_frozen():
    network = model()
    network.get_layer("conv_conv").trainable = False
    assert optimizers.rate_factors(network, 0.9, 1.0) == [0.9**6] * 2 + [1.0] * 2


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_corrects_the_moments_of_unfrozen_layers_from_their_own_start(name):
    """Without it their first step would be three times as long, and later ones six times."""
    for iterations in (20, 18):  # fewer where loss scaling skipped steps
        network = model(optimizer=name, learning_rate=0.01, start=20)
        network.optimizer.iterations.assign(iterations)
        for path, (before, after) in move(network, gradient=1.0).items():
            # The moments of the last layer are those of a first step too, but it is step 21 or 19.
            correction = (1 - 0.999 ** (iterations + 1)) ** 0.5 / (1 - 0.9 ** (iterations + 1))
            factor = 0.1 / 0.001**0.5 * correction if path.startswith("logits") else 1
            np.testing.assert_allclose(before - after, 0.01 * factor, rtol=1e-3, err_msg=path)


def test_rates_of_a_network_with_auxiliary_classifiers():
    """Their variables are the last of the model's, and not of the layers'."""
    network = models.build("googlenet", (32, 32, 3), 3)
    factors = optimizers.rate_factors(network, 1.0, 10.0)
    variables = zip(network.trainable_variables, factors, strict=True)
    assert {v.path for v, factor in variables if factor != 1} == {"logits/kernel", "logits/bias"}


def test_decay_of_adamw_follows_the_rate_of_each_layer():
    flags = {"learning_rate": 0.1, "weight_decay": 0.5, "layer_decay": 0.9, "head_rate": 4.0}
    moved = move(model(optimizer="adamw", **flags), gradient=0.0)
    for path, (before, after) in moved.items():
        factor = {"conv_conv/kernel": 0.9**12, "logits/kernel": 4}.get(path, 0)
        np.testing.assert_allclose(after, before * (1 - 0.05 * factor), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("all_decay", [False, True])
def test_decay_of_adamw_is_decoupled_and_on_kernels_unless_told(all_decay):
    flags = {"learning_rate": 0.1, "weight_decay": 0.5, "decay_biases": all_decay}
    network = model(optimizer="adamw", **flags)
    network.get_layer("conv_conv").bias.assign([1.0, 2, 3, 4])
    moved = move(network, gradient=0.0)
    for path, (before, after) in moved.items():
        share = 1 - 0.1 * 0.5 if all_decay or path.endswith("kernel") else 1
        np.testing.assert_allclose(after, before * share, rtol=1e-6, err_msg=path)
    assert network._step.weight_decay == network._step.bias_decay == 0


@pytest.mark.parametrize(
    ("flags", "decay"),
    [
        ({"optimizer": "sgd", "bias_rate": 4.0}, 0.0),
        ({"optimizer": "sgd", "bias_rate": 4.0, "decay_biases": True}, 0.125),
        ({"optimizer": "sgd", "bias_rate": 0.0, "decay_biases": True}, 0.5),
        ({"optimizer": "muon", "bias_rate": 4.0, "decay_biases": True}, 0.125),
        ({"optimizer": "adam", "bias_rate": 4.0, "decay_biases": True}, 0.5),
    ],
)
def test_biases_shrink_as_much_in_a_step_as_kernels(flags, decay):
    step = model(**flags, weight_decay=0.5)._step
    assert (step.weight_decay, step.bias_decay) == (0.5, decay)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_decay_of_the_others_is_an_l2_penalty_in_the_gradient(name):
    network = model(optimizer=name, learning_rate=0.1, weight_decay=0.5, momentum=0.0)
    kernel = network.get_layer("conv_conv").kernel
    before = kernel.numpy()
    # Logits that do not depend on the image leave the penalty alone to move the first kernel.
    network.get_layer("logits").kernel.assign(tf.zeros((4, 3)))
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    network.fit(images, np.eye(3, dtype=np.float32)[[0, 1, 2, 0]], batch_size=4, verbose=0)
    change = 0.5 * before
    if name == "adam":  # whose first step divides by the gradient's size; epsilon as Keras has it
        change /= np.abs(change) + 1e-7 / np.sqrt(1 - 0.999)
    np.testing.assert_allclose(before - kernel.numpy(), 0.1 * change, rtol=1e-3, atol=1e-6)
    assert not network.optimizer.weight_decay


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_rate_and_steps_can_be_read_under_mixed_precision(name):
    keras.config.set_dtype_policy("mixed_float16")
    network = model(optimizer=name, learning_rate=0.5, epochs=1, lr_schedule="step(0.1)")
    assert float(network.optimizer.learning_rate) == pytest.approx(0.5)
    images = np.full((2, 4, 4, 3), 99, np.uint8)
    network.fit(images, np.eye(3, dtype=np.float32)[:2], batch_size=2, verbose=0)
    assert int(network.optimizer.iterations.numpy()) == 1
    assert float(network.optimizer.learning_rate) == pytest.approx(0.05)


# ---- Adam as one kernel

PAIRS = {
    "adam": (optimizers.Adam, keras.optimizers.Adam),
    "adamw": (optimizers.AdamW, keras.optimizers.AdamW),
}
SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (1,)}


def start(kind, dtype: str = "float32", **arguments) -> tuple:
    """A built optimizer and its variables."""
    random = np.random.default_rng(0)
    variables = [
        keras.Variable(random.normal(0, 1, shape), dtype=dtype, name=name)
        for name, shape in SHAPES.items()
    ]
    optimizer = kind(**({"learning_rate": 0.1} | arguments))
    if kind in PAIRS["adamw"]:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(variables)
    return optimizer, variables


def slopes(step: int) -> list:
    random = np.random.default_rng(100 + step)
    return [random.normal(0, 10.0 ** (step % 3 - 1), shape) for shape in SHAPES.values()]


def go(optimizer, variables, steps: range, apply=None) -> list:
    """The variables after each of the steps."""
    taken = []
    for step in steps:
        gradients = [tf.constant(g, variables[0].dtype) for g in slopes(step)]
        (apply or optimizer.apply)(gradients, variables)
        taken.append([v.numpy() for v in (*variables, *optimizer.variables)])
    return taken


def assert_steps_equal(one: list, other: list, tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    moved = [a - b for a, b in zip(one[-1], one[0], strict=True)][: len(SHAPES)]
    assert min(np.abs(m).max() for m in moved) > 0.1


def applied(optimizer, variables, gradients) -> int:
    """Adam's kernels in the graph of one step."""
    call = tf.function(lambda: optimizer.apply(gradients, variables), autograph=False)
    operations = call.get_concrete_function().graph.get_operations()
    return sum(operation.type == "ResourceApplyAdam" for operation in operations)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": "float64"},
        {"learning_rate": Schedule("cosine", 0.2, 12, 3)},
        {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"clipvalue": 0.1},
        {"weight_decay": 0.3},
        {"amsgrad": True},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 8.0},
    ],
    ids=lambda arguments: "-".join(arguments) or "defaults",
)
def test_each_of_ten_steps_is_that_of_keras(pair, arguments):
    taken = [go(*start(kind, **arguments), range(10)) for kind in PAIRS[pair]]
    assert_steps_equal(*taken, 1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_ten_steps_compiled_by_xla_are_those_of_keras(pair):
    arguments = {"learning_rate": Schedule("cosine", 0.2, 12, 3), "global_clipnorm": 0.5}
    ours, variables = start(PAIRS[pair][0], **arguments)
    apply = tf.function(
        lambda gradients, _: ours.apply(gradients, variables), jit_compile=True, autograph=False
    )
    taken = go(ours, variables, range(10), apply)
    assert_steps_equal(taken, go(*start(PAIRS[pair][1], **arguments), range(10)), 2e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_kernel_updates_each_variable(pair):
    gradients = [tf.constant(g, tf.float32) for g in slopes(0)]
    ours, theirs = PAIRS[pair]
    assert applied(*start(ours), gradients) == len(SHAPES)
    assert applied(*start(theirs), gradients) == 0
    assert applied(*start(ours, amsgrad=True), gradients) == 0


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_is_that_of_keras_and_goes_on_both_ways(pair, amsgrad):
    def layout(optimizer):
        return [(v.name, v.path, v.shape, v.dtype) for v in optimizer.variables]

    built = [start(kind, amsgrad=amsgrad, name="same") for kind in PAIRS[pair]]
    assert layout(built[0][0]) == layout(built[1][0])
    straight = go(*built[1], range(10))
    for first, second in (PAIRS[pair], PAIRS[pair][::-1]):
        one, variables = start(first, amsgrad=amsgrad)
        go(one, variables, range(5))
        state: dict = {}
        one.save_own_variables(state)
        other, others = start(second, amsgrad=amsgrad)
        other.load_own_variables(state)
        for mine, theirs in zip(others, variables, strict=True):
            mine.assign(theirs)
        assert_steps_equal(go(other, others, range(5, 10)), straight[5:], 2e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_optimizer_can_be_written_and_read(pair):
    ours, theirs = PAIRS[pair]
    arguments = {"learning_rate": 0.02, "beta_1": 0.8, "clipnorm": 1.5, "weight_decay": 0.1}
    config = ours(name="same", **arguments).get_config()
    assert config == theirs(name="same", **arguments).get_config()
    assert ours.from_config(config).get_config() == config
    again = keras.optimizers.deserialize(keras.optimizers.serialize(ours(**arguments)))
    assert type(again) is ours
    assert again.get_config()["beta_1"] == 0.8
