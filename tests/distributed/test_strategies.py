"""One device, replicas and workers compute the same: weights, optimizer, averages, figures.

tests/strategies.py computes the cases, each strategy in processes of its own. In float64 nothing but
the order of sums differs. In float32 that is enough to put an activation on the other side of ReLU's
kink, which costs a step the gradient of a pixel.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.distributed.strategies import (
    CASES,
    FITS,
    LARGE,
    ORDERS,
    RATES,
    ROUNDING,
    RUNS,
    STRATEGIES,
    rounding,
)

ALL = [name for name in CASES if name not in LARGE | ROUNDING]
# What needs a minute or more of several processes is left to `-m slow`.
FEW = ["sgd", "uneven batches", "all at once", "last batch of two"]
USUAL = [
    *("adam", "sgd", "sgd float32", "uneven batches", "global_clipnorm", "accumulate_steps", "ema"),
    *("mixup", "all at once"),
    *("dropout", "last batch of one", "last batch of two", "clipnorm", "mixed_float16"),
    *("refusals", "masks", "resnet20 adam"),
]
PLAN = {
    "one device": USUAL,
    "mirrored 2": USUAL,
    "2 workers": ["adam", *FEW, "dropout", "mixed_float16", "refusals"],
}
SLOW_PLAN = dict.fromkeys(STRATEGIES, ALL)
LARGE_PLAN = {
    "one device": ["googlenet", "vgg_bn_drop"],
    "mirrored 2": ["googlenet", "vgg_bn_drop"],
    "2 workers": ["googlenet", "vgg_bn_drop", "vgg_bn_drop dropout"],
}

TOLERANCES = {"sgd float32": 5e-5}
HALF = 1e-3  # of the weights, in half precision


def computed(directory, plan: dict) -> dict:
    """{(strategy, worker): arrays by "CASE|what|name"}."""
    command = [
        sys.executable,
        "-m",
        "tests.distributed.strategies",
        str(directory),
        json.dumps(plan),
    ]
    # The processes are forked, so nothing may start threads before.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
    logs = ""
    for path in directory.glob("*.log"):
        # After a signal the stacks are followed by kilobytes of modules' names.
        log = path.read_text().partition("Extension modules:")[0]
        logs += f"\n{path.name}\n{log[-3000:]}"
    assert done.returncode == 0, done.stderr + logs
    found = {}
    for path in directory.glob("*.npz"):
        strategy, _, worker = path.stem.rpartition("-")
        found[strategy, int(worker)] = dict(np.load(path))
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict:
    return computed(tmp_path_factory.mktemp("strategies"), PLAN)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> dict:
    return computed(tmp_path_factory.mktemp("all"), SLOW_PLAN)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict:
    return computed(tmp_path_factory.mktemp("large"), LARGE_PLAN)


def of_case(arrays: dict, case: str) -> dict:
    return {k.partition("|")[2]: v for k, v in arrays.items() if k.startswith(f"{case}|")}


def check(found: dict, strategy: str, case: str) -> None:
    """Compares a case of a strategy with that of one device, and the workers with each other."""
    one, other = (of_case(found[name, 0], case) for name in ("one device", strategy))
    assert not [name for name in other if name.startswith("unequal")]
    for (name, worker), arrays in found.items():
        if name == strategy and worker:
            mine = of_case(arrays, case)
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                np.testing.assert_array_equal(value, other[key], err_msg=key)
    assert other
    if case.endswith("dropout"):
        return  # Each replica drops others.
    half = case.startswith("mixed_float16")
    tolerance = HALF if half else TOLERANCES.get(case, 1e-8)
    assert one.keys() == other.keys()
    assert len(one) > 10
    for key, value in one.items():
        if "accuracy" in key and tolerance > 1e-8:
            continue  # A kink may change the answer on one image.
        if half and not key.startswith(("weights", "before", "after")):
            continue
        np.testing.assert_allclose(other[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


def check_refusals(found: dict, strategy: str) -> None:
    one, other = (of_case(found[name, 0], "refusals") for name in ("one device", strategy))
    assert "model was built outside" in str(other["refused|model outside"])
    for key, message in other.items():
        assert str(message).startswith("ValueError: "), key
        assert "\n" not in str(message)
    # One device takes what is wrong with replicas alone.
    assert {key for key, message in one.items() if str(message)} == {
        "refused|accumulating optimizer",
        "refused|averaging optimizer",
    }


def compared(plan: dict) -> list:
    return [
        (strategy, case)
        for strategy in plan
        for case in plan[strategy]
        if strategy != "one device" and case not in ("refusals", "masks")
    ]


@pytest.mark.parametrize(("strategy", "case"), compared(PLAN))
def test_strategy_computes_what_one_device_does(usual, strategy, case):
    check(usual, strategy, case)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "case"), compared(SLOW_PLAN))
def test_every_strategy_computes_what_one_device_does(everything, strategy, case):
    check(everything, strategy, case)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "case"), compared(LARGE_PLAN))
def test_strategy_computes_whole_networks_as_one_device_does(large, strategy, case):
    check(large, strategy, case)


KINDS = {
    "first step": lambda key: key.startswith("first"),
    "kernels": lambda key: key.startswith("weights") and key.endswith("kernel"),
    "moving mean": lambda key: "moving_mean" in key,
    "moving variance": lambda key: "moving_variance" in key,
}


def distances(one: dict, other: dict) -> dict[str, np.ndarray]:
    """[largest difference, Euclidean distance] of each kind of array."""
    found = {}
    for kind, belongs in KINDS.items():
        gaps = np.concatenate([(one[key] - other[key]).ravel() for key in one if belongs(key)])
        found[kind] = np.array([np.abs(gaps).max(), np.linalg.norm(gaps)])
    return found


def from_one_device(directory, rates, folder: str = "") -> dict[float, tuple[dict, dict, float]]:
    """For each rate: distances by strategy, by order of the examples, and how far kernels moved."""
    strategies = ("mirrored 2", "mirrored 3", "2 workers")
    plan = {name: [rounding(rate, None, folder) for rate in rates] for name in strategies}
    orders = [rounding(rate, order, folder) for rate in rates for order in ORDERS]
    arrays, found = computed(directory, plan | {"one device": orders}), {}
    for rate in rates:
        one, *others = (
            of_case(arrays["one device", 0], rounding(rate, order, folder)) for order in ORDERS
        )
        replicas = {s: of_case(arrays[s, 0], rounding(rate, None, folder)) for s in plan}
        ends = [v for k, v in one.items() if KINDS["kernels"](k)]
        starts = [v for k, v in one.items() if k.startswith("initial") and k.endswith("kernel")]
        moved = sum(np.sum((x - y) ** 2) for x, y in zip(starts, ends, strict=True)) ** 0.5
        found[rate] = (
            {strategy: distances(one, arrays) for strategy, arrays in replicas.items()},
            dict(enumerate(distances(one, arrays) for arrays in others)),
            moved,
        )
        for name, kinds in (found[rate][0] | found[rate][1]).items():
            figures = ", ".join(f"{k} {v[0]:.1e} ({v[1]:.1e})" for k, v in kinds.items())
            print(f"{rate:g} {name}: {figures}, {kinds['kernels'][1] / moved:.1e} of the way")
    return found


def check_rounding(strategies: dict, orders: dict) -> None:
    """In float32, resnet20's replicas differ from one device as one device does from itself where the
    examples of each batch come in another order: the same step but for rounding.
    """
    for kind in KINDS:
        noise = np.max([each[kind] for each in orders.values()], axis=0)
        for strategy, each in strategies.items():
            assert (each[kind] <= 3 * noise).all(), (strategy, kind)


@pytest.mark.slow
def test_strategies_in_float32_are_as_far_from_one_device_as_its_own_rounding(tmp_path):
    strategies, orders, _ = from_one_device(tmp_path, [1e-3])[1e-3]
    check_rounding(strategies, orders)
    for each in strategies.values():
        assert each["first step"][0] < 1e-5
    # One device itself does not keep the bound that the small network does.
    assert min(each["kernels"][0] for each in orders.values()) > TOLERANCES["sgd float32"]


@pytest.mark.cifar
def test_strategies_in_float32_on_cifar(tmp_path):
    found = from_one_device(tmp_path, RATES, "CIFAR10_FOLDER")
    check_rounding(*found[max(RATES)][:2])
    for each in found[min(RATES)][0].values():
        assert each["kernels"][0] < TOLERANCES["sgd float32"]


@pytest.mark.parametrize("strategy", ["mirrored 2", "2 workers"])
def test_what_would_be_wrong_is_refused_in_one_line(usual, strategy):
    check_refusals(usual, strategy)


def test_replicas_drop_other_elements(usual):
    masks = list(of_case(usual["mirrored 2", 0], "masks").values())
    assert len(masks) == 4
    for index, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.5, abs=0.06)
        for other in masks[:index]:
            assert (mask != other).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("case", [name for name in USUAL if name in RUNS and RUNS[name].without])
def test_flag_changes_the_weights(usual, case):
    with_it, without = (
        of_case(usual["one device", 0], name) for name in (case, RUNS[case].without)
    )
    keys = [key for key in with_it if key.startswith("weights") and "kernel" in key]
    assert keys
    assert any(
        np.abs(with_it[key] - without.get(key, 0.0)).max() > 1e-4
        for key in keys
        if with_it[key].shape == without[key].shape
    )


def test_clipping_changes_the_weights(usual):
    even = FITS["clipnorm"].without
    assert even == "even"
    clipped = of_case(usual["one device", 0], "clipnorm")
    first = max(
        np.abs(v - clipped[k.replace("first", "initial")]).max()
        for k, v in clipped.items()
        if k.startswith("first")
    )
    # The rate is 0.1: no variable moves by more than the limit of its gradient allows.
    assert 1e-5 < first <= 0.1 * FITS["clipnorm"].arguments["clipnorm"] + 1e-12


@pytest.mark.parametrize("strategy", ["one device", "mirrored 2", "2 workers"])
def test_step_that_overflows_changes_nothing_and_lowers_the_scale(usual, strategy):
    found = of_case(usual[strategy, 0], "mixed_float16")
    before = {k: v for k, v in found.items() if k.startswith("before the overflow")}
    assert before
    for key, value in before.items():
        np.testing.assert_array_equal(found[key.replace("before", "after")], value)
    (scale,) = (v for k, v in found.items() if k.startswith("scale"))
    assert scale == 2.0**119
