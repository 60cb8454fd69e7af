"""One device, replicas and workers compute the same: weights, optimizer, averages, metrics.

tests/distributed/strategies.py computes the cases, each strategy in processes of its own. In float64
only the order of sums differs. In float32 that is enough to move an activation across ReLU's kink,
which changes a step by the gradient of a pixel.
"""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import WITHOUT_THREADS
from tests.distributed.strategies import CASES, FITS, LARGE, MASKS, NORMS, ROUNDING, STRATEGIES
from tests.distributed.test_rendezvous import free_addresses

COMPARED = [
    *("adam", "sgd float32", "uneven batches", "all at once", "last batch of one", "clipnorm"),
    *("mixed_float16", "class_weight", "normalization", "groups, all at once", "groups, unfrozen"),
]
ALL = [name for name in CASES if name not in LARGE | ROUNDING]
# {strategy: cases}; what takes minutes is left to `-m slow`.
PLANS = {
    "quick": {
        "one device": COMPARED,
        "mirrored 2": [*COMPARED, "dropout", "each replica by itself", "masks", "outside"],
        "2 workers": [
            *("adam", "all at once", "mixed_float16"),
            *("groups, all at once", "groups, unfrozen", "each replica by itself"),
        ],
    },
    "all": dict.fromkeys(STRATEGIES, ALL),
    "large": {
        "one device": ["googlenet", "vgg_bn_drop", "mobilenetv3small"],
        "mirrored 2": ["googlenet", "vgg_bn_drop", "mobilenetv3small"],
        "2 workers": ["googlenet", "vgg_bn_drop", "vgg_bn_drop dropout"],
    },
}
NOT_TRAINING = ("masks", "normalization", "outside")

TOLERANCES = {"sgd float32": 5e-5, "groups, float32": 5e-5}
HALF = 1e-3  # of the weights, in half precision


def computed(directory, plan: dict) -> dict:
    """{(strategy, worker): arrays by "CASE|what|name"}."""
    module = "tests.distributed.strategies"
    command = [sys.executable, "-m", module, str(directory), json.dumps(plan)]
    env = os.environ | WITHOUT_THREADS | {"TF_NUM_INTRAOP_THREADS": "1"}
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
def results_of(tmp_path_factory):
    """A function: what a plan computes, once."""
    return functools.cache(lambda plan: computed(tmp_path_factory.mktemp(plan), PLANS[plan]))


@pytest.fixture
def results(results_of) -> dict:
    return results_of("quick")


def of_case(arrays: dict, case: str) -> dict:
    return {k.partition("|")[2]: v for k, v in arrays.items() if k.startswith(f"{case}|")}


COMPARISONS = [
    pytest.param(plan, strategy, case, marks=[] if plan == "quick" else pytest.mark.slow)
    for plan, cases in PLANS.items()
    for strategy in cases
    for case in cases[strategy]
    if strategy != "one device" and case not in NOT_TRAINING
]


@pytest.mark.parametrize(("plan", "strategy", "case"), COMPARISONS)
def test_strategy_computes_what_one_device_does(results_of, plan, strategy, case):
    """The workers of a strategy are compared with each other, too."""
    found = results_of(plan)
    one, other = (of_case(found[name, 0], case) for name in ("one device", strategy))
    assert not [name for name in other if name.startswith("unequal")]
    for (name, worker), arrays in found.items():
        if name == strategy and worker:
            mine = of_case(arrays, case)
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                np.testing.assert_array_equal(value, other[key], err_msg=key)
    assert other
    if case.endswith(("dropout", "each replica by itself")):
        return  # The masks differ, or the statistics.
    half = case.startswith("mixed_float16")
    tolerance = HALF if half else TOLERANCES.get(case, 1e-8)
    assert one.keys() == other.keys()
    assert len(one) > 10
    for key, value in one.items():
        if "accuracy" in key and tolerance > 1e-8:
            continue  # A kink may change the prediction of one image.
        if half and not key.startswith(("weights", "before", "after")):
            continue
        np.testing.assert_allclose(other[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


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


@pytest.mark.slow
def test_strategies_in_float32_are_as_far_from_one_device_as_its_own_rounding(tmp_path):
    """As far as one device is from itself when the examples of each batch come in another order."""
    strategies = ("mirrored 2", "mirrored 3", "2 workers")
    same, *others = ROUNDING
    plan = {"one device": list(ROUNDING)} | {strategy: [same] for strategy in strategies}
    arrays = computed(tmp_path, plan)
    one = of_case(arrays["one device", 0], same)
    orders = [distances(one, of_case(arrays["one device", 0], order)) for order in others]
    for strategy in strategies:
        found = distances(one, of_case(arrays[strategy, 0], same))
        for kind, values in found.items():
            assert (values <= 3 * np.max([order[kind] for order in orders], axis=0)).all(), kind
        assert found["first step"][0] < 1e-5
    # One device itself exceeds the tolerance of the small network.
    assert min(order["kernels"][0] for order in orders) > TOLERANCES["sgd float32"]


@pytest.mark.parametrize(("dtype", "mean", "rank", "training"), NORMS)
def test_replicas_normalize_by_the_statistics_of_the_whole_batch(
    results, dtype, mean, rank, training
):
    case = f"{dtype} {mean} {rank} {training}"
    tolerances = {"float32": (1e-5, 5e-4), "float64": (1e-12, 1e-9)}
    one, two = (of_case(results[s, 0], "normalization") for s in ("one device", "mirrored 2"))
    keys = [key for key in one if key.startswith(case)]
    assert len(keys) == 6
    assert not [key for key in two if key.startswith("unequal")]
    for key in keys:
        atol = tolerances[dtype][mean > 0] * max(1.0, np.abs(one[key]).max())
        np.testing.assert_allclose(two[key], one[key], rtol=0, atol=atol, err_msg=key)
    y = one[f"{case}|y"].reshape(2, -1)
    # By its own statistics, each half would have a mean of its beta.
    assert abs(y[0].mean() - y[1].mean()) > 0.5


def test_layers_can_be_called_outside_of_the_replicas(results):
    found = of_case(results["mirrored 2", 0], "outside")
    x, y = found["x"], found["dropped"]
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(found["norm"], (x - mean) / variance**0.5, atol=1e-4)
    np.testing.assert_allclose(found["moving_mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(y, np.where(y == 0, 0, x * 2), atol=1e-6)
    assert (y == 0).mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(("channels", "noise_shape"), MASKS)
def test_each_replica_and_call_has_its_own_dropout_mask(results, channels, noise_shape):
    case = f"masks|{channels} {noise_shape}"
    masks = list(of_case(results["mirrored 2", 0], case).values())
    assert len(masks) == 4
    for index, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.5, abs=0.06)
        for other in masks[:index]:
            assert (mask != other).mean() == pytest.approx(0.5, abs=0.06)


def test_clipping_changes_the_weights(results):
    clipped = of_case(results["one device", 0], "clipnorm")
    first = max(
        np.abs(v - clipped[k.replace("first", "initial")]).max()
        for k, v in clipped.items()
        if k.startswith("first")
    )
    # The rate is 0.1: no variable moves by more than the limit of its gradient allows.
    assert 1e-5 < first <= 0.1 * FITS["clipnorm"].arguments["clipnorm"] + 1e-12


@pytest.mark.parametrize("strategy", ["one device", "mirrored 2", "2 workers"])
def test_step_that_overflows_changes_nothing_and_lowers_the_scale(results, strategy):
    found = of_case(results[strategy, 0], "mixed_float16")
    before = {k: v for k, v in found.items() if k.startswith("before the overflow")}
    assert before
    for key, value in before.items():
        np.testing.assert_array_equal(found[key.replace("before", "after")], value)
    (scale,) = (v for k, v in found.items() if k.startswith("scale"))
    assert scale == 2.0**119


@pytest.mark.slow
def test_packs_of_gradients_are_reduced_while_the_backward_pass_continues(tmp_path):
    addresses = ",".join(free_addresses(2))
    module = (sys.executable, "-m", "tests.distributed.overlap")
    env = os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
    with subprocess.Popen([*module, "1", addresses, str(tmp_path)], env=env) as other:
        chief = [*module, "0", addresses, str(tmp_path)]
        done = subprocess.run(chief, env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode, other.wait(60)) == (0, 0), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = [end - start for start, end in found["reduced"]]
    before = [end - start for start, end in found["reduced"] if end < found["last gradient"]]
    print(f"{len(before)} of {len(seconds)} packs, {sum(before):.2f} of {sum(seconds):.2f} s")
    assert len(seconds) > 5
    # All but the last, which has the gradients of the first layers.
    assert len(before) >= len(seconds) - 2
    assert sum(before) > sum(seconds) / 2
