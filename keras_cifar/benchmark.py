"""Measures this machine: the training step, the input pipeline, both together, prediction, memory.

python -m keras_cifar.benchmark --model resnet32 --peers

Every contender works in a process of its own and takes turns with the others; figures are medians
of the rounds. The peers are plain Keras 3 as pip installs it, and PyTorch and PaddlePaddle where
they are installed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from keras_cifar.core import cli, environment
from keras_cifar.core.config import DTYPE_POLICIES
from keras_cifar.core.options import check, option

WORKERS = pathlib.Path(__file__).parent / "benchmarking"

PREDICTED = 10_000  # images, as many as CIFAR-10's test split
WARM_UP = 3  # calls before the first that is timed
SLOWER = 0.95  # of two rates: what is less than the other by chance alone is above this
ARITHMETIC = 0.6  # of the matrix-multiply rate: from here on little but arithmetic is left

GROWTH = {
    "batch_size": (32, 64, 128, 256, 512, 1024),
    "depth": (20, 32, 44, 56, 110),
    "images": (5_000, 10_000, 25_000, 50_000),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """The command's flags."""

    model: str = option("resnet32", "network; peers have resnetN and vgg_bn_drop", "Work")
    data: str = option(
        "digits", "as of train; --data=folder:PATH with CIFAR-10 gives the usual figures", "Work"
    )
    augment: str = option("crop(4)|flip", "as of train", "Work")
    batch_size: int = option(128, "images a step", "Work")
    dtype_policy: str = option("float32", "of ours; the peers have float32", "Work", DTYPE_POLICIES)
    peers: bool = option(False, "compare with plain Keras, PyTorch and PaddlePaddle", "Comparison")
    growth: bool = option(
        False, "instead: how speed and memory grow with batch, depth and images", "Comparison"
    )
    distribution: bool = option(
        False,
        "instead: what two replicas and two processes cost here, and what many GPUs would bring",
        "Comparison",
    )
    serving: bool = option(
        False,
        "instead: requests a second and latency of serve, beside Model.predict in FastAPI",
        "Comparison",
    )
    steps: int = option(20, "of an epoch, with --distribution", "Comparison")
    rounds: int = option(5, "turns of each contender", "Comparison")
    seconds: float = option(5.0, "of a turn", "Comparison")
    json: str | None = option(None, "also write all figures to this file", "Output")

    def __post_init__(self):
        for name in ("batch_size", "rounds", "seconds", "steps"):
            value = getattr(self, name)
            check(value > 0, f"--{name}={value} must be greater than 0")


def main(options: BenchmarkOptions) -> None:
    """Runs the command."""
    from keras_cifar import models
    from keras_cifar.core import files
    from keras_cifar.data import augmentation

    augmentation.parse(options.augment)
    network = models.build(options.model).deployable
    flops = 6 * models.count_multiply_adds(network)  # multiply and add; forward, and twice backward
    if options.distribution:
        result = {"distribution": distribute(options)}
    elif options.serving:
        result = {"serving": serve(options)}
    else:
        result = {"growth": growth(options)} if options.growth else compare(options, flops)
    result = {"flags": dataclasses.asdict(options), "machine": machine()} | result
    print(f"machine   {result['machine']}")
    if options.json:
        files.write_json(pathlib.Path(options.json), result)
        print(f"figures   {options.json}")


def machine() -> str:
    """The machine and the versions, in a line."""
    import importlib.metadata

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("tensorflow", "keras")]
    for name in ("torch", "paddlepaddle"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([environment.machine(), *versions])


# ---- Contenders


class Worker:
    """A measurement in a process of its own."""

    def __init__(self, script: str, settings: dict, variables: dict[str, str | None]):
        """Starts it and waits until it is ready.

        Args:
            script: of WORKERS. "ours" has the switches of `environment`, the others have not.
            variables: of the environment, to set or (None) to take out.
        """
        if script == "ours":
            env, command = _our_environment(), ["-m", f"keras_cifar.benchmarking.{script}"]
        else:
            env = {k: v for k, v in os.environ.items() if k not in environment.changed}
            command = [str(WORKERS / f"{script}.py")]
        env = {k: v for k, v in (env | variables).items() if v is not None}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it.
        self._process = subprocess.Popen(
            [sys.executable, *command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self.turns = []
        self.error = self._read().get("error")

    def turn(self, counted: bool = True) -> dict:
        """Lets it work for a turn."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._read()
        self.error = answer.get("error")
        if counted and not self.error:
            self.turns.append(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines() or ["no word"]
        return {"error": f"failed: {last[-1]}"}

    @property
    def figures(self) -> dict:
        """{median, lowest and highest rate, peak memory in bytes}."""
        peak = max(turn["peak_memory"] for turn in self.turns)
        return _spread([turn["rate"] for turn in self.turns]) | {"peak_memory": peak}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


class Contest(contextlib.ExitStack):
    """Workers that take turns."""

    def __init__(self, options: BenchmarkOptions):
        super().__init__()
        self.options, self.workers = options, {}

    def add(self, name: str, script: str, variables: dict | None = None, **settings) -> Worker:
        """Starts a worker; one that cannot be had is reported and left out."""
        options = self.options
        common = {
            "model": options.model,
            "data": options.data,
            "augment": options.augment,
            "batch_size": options.batch_size,
            "dtype_policy": options.dtype_policy,
            "seconds": options.seconds,
            "warm_up": WARM_UP,
        }
        _say(f"starting {name}")
        worker = Worker(script, common | settings, variables or {})
        self.callback(worker.close)
        self.workers[name] = worker
        if worker.error:
            _say(f"{name} {worker.error}\n")
        return worker

    def take_turns(self) -> dict[str, dict]:
        """Name -> figures, after all rounds."""
        for number in range(self.options.rounds):
            for name, worker in self.workers.items():
                if not worker.error:
                    _say(f"round {number + 1} of {self.options.rounds}: {name}")
                    worker.turn()
                    if worker.error:
                        _say(f"{name} {worker.error}\n")
        _say("")
        return {name: w.figures for name, w in self.workers.items() if not w.error}


def _our_environment() -> dict[str, str]:
    """The environment in which `-m keras_cifar...` finds this very package."""
    paths = [str(WORKERS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _say(text: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty() or text.endswith("\n"):
        print(
            f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr, flush=True
        )


# ---- What is measured

STEP, FIT, PIPELINE, PREDICT = "training step", "whole fit", "input pipeline", "prediction"
GEMM = "matrix multiply, GFLOP/s"
PLAIN, PLAIN_PREDICT = "plain Keras", "plain Keras, prediction"


def compare(options: BenchmarkOptions, flops: int) -> dict:
    """Measures and prints everything but growth."""
    with tempfile.TemporaryDirectory() as scratch, Contest(options) as contest:
        export = pathlib.Path(scratch) / "export"
        step = contest.add(STEP, "ours", what="step")
        if step.error:
            raise RuntimeError(step.error)
        steps = max(
            3, round(step.turn(counted=False)["rate"] * options.seconds / options.batch_size)
        )
        contest.add(FIT, "ours", what="fit", steps=steps)
        contest.add(PIPELINE, "ours", what="pipeline")
        small = {"warm_up": 1, "count": PREDICTED}
        contest.add(PREDICT, "ours", what="predict", export=str(export), **small)
        # Some machines name an older CPU to OpenBLAS, which halves its rate.
        contest.add(GEMM, "gemm", {"OPENBLAS_CORETYPE": None})
        if options.peers:
            contest.add(PLAIN, "plain_keras", what="step")
            contest.add(
                "plain Keras without oneDNN",
                "plain_keras",
                {"TF_ENABLE_ONEDNN_OPTS": "0"},
                what="step",
            )
            for compile in (False, True):
                for last in (False, True):
                    kind = "torch.compile" if compile else "PyTorch eager"
                    name = f"{kind}, channels last" if last else kind
                    contest.add(name, "pytorch", compile=compile, channels_last=last)
            contest.add("PaddlePaddle", "paddlepaddle")
            contest.add(PLAIN_PREDICT, "plain_keras", what="predict", **small)
        figures = contest.take_turns()
        cold = cold_start(options, export)
        profile = contest.add("profile", "ours", what="profile")
        shares = profile.turn().get("shares", {})
    figures[GEMM] = {
        key: value / 1e9 if key != "peak_memory" else value for key, value in figures[GEMM].items()
    }
    fraction = figures[STEP]["median"] * flops / 1e9 / figures[GEMM]["median"]
    result = {
        "figures": figures,
        "cold_start": cold,
        "flops_an_image": flops,
        "fraction_of_matrix_multiply": fraction,
        "shares": shares,
        "bound": bound(figures, fraction, shares),
    }
    _print(options, result)
    return result


def cold_start(options: BenchmarkOptions, export: pathlib.Path) -> dict:
    """Seconds of `predict` on one picture and of importing TensorFlow, each in a new process."""
    import numpy as np
    from PIL import Image

    picture = export.parent / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    commands = {
        "predict": ["-m", "keras_cifar.predict", f"--model={export}", str(picture)],
        "import": ["-c", "import tensorflow"],
    }
    seconds = {name: [] for name in commands}
    env = _our_environment()
    for number in range(options.rounds + 1):
        _say(f"cold start {number} of {options.rounds}")
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], env=env, capture_output=True, check=True)
            if number:  # The first fills the disk's cache.
                seconds[name].append(time.perf_counter() - start)
    _say("")
    return {name: _spread(values) for name, values in seconds.items()}


def bound(figures: dict, fraction: float, shares: dict) -> str:
    """What training is bound by, in words."""
    step, fit, pipe = (figures[name]["median"] for name in (STEP, FIT, PIPELINE))
    if pipe < step:
        return (
            f"the input pipeline: it makes {pipe:,.0f} images a second, the step takes {step:,.0f}"
        )
    if fit < SLOWER * step:
        return (
            f"what surrounds the step: fit has {fit / step:.2f} of its rate, while the pipeline alone "
            f"is {pipe / step:.0f} times faster; larger batches help"
        )
    kind, share = next(iter(shares.items()), ("unknown kernels", 0.0))
    reason = (
        "arithmetic" if fraction >= ARITHMETIC else "memory and small kernels more than arithmetic"
    )
    return (
        f"{reason}: the step reaches {fraction:.2f} of the matrix-multiply rate, {share:.0%} of its "
        f"kernels' time is {kind}"
    )


def _print(options: BenchmarkOptions, result: dict) -> None:
    figures, cold = result["figures"], result["cold_start"]
    print(
        f"{options.model}, batches of {options.batch_size}, {options.dtype_policy}, {options.data}"
    )
    print()
    _print_table("images a second", "median", 34, figures)
    for name, row in cold.items():
        title = {"predict": "predict one picture, s", "import": "import tensorflow, s"}[name]
        print(f"{title:<34}{row['median']:>10.2f}{row['low']:>10.2f}{row['high']:>10.2f}")
    print("\nratios of medians")
    ours = (STEP, FIT, PIPELINE, PREDICT, GEMM)
    pairs = [(FIT, STEP), (PIPELINE, STEP)]
    for name in (name for name in figures if name not in ours):
        pairs.append((PREDICT if name == PLAIN_PREDICT else STEP, name))
    for mine, other in pairs:
        ratio = figures[mine]["median"] / figures[other]["median"]
        print(f"{ratio:>8.2f}  {mine} / {other}")
    print(f"{result['fraction_of_matrix_multiply']:>8.2f}  training step / matrix multiply")
    print(f"{cold['predict']['median'] - cold['import']['median']:>8.2f}  s more than the import")
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in result["shares"].items())
    print(f"\ntime of the step's kernels: {shares}")
    print(f"bound by {result['bound']}")


def _print_table(first: str, second: str, width: int, figures: dict) -> None:
    """A row of figures a name, under two headings and what all tables have."""
    print(f"{first:<{width}}{second:>10}{'low':>10}{'high':>10}{'peak memory':>14}")
    for name, row in figures.items():
        print(
            f"{name:<{width}}{row['median']:>10,.0f}{row['low']:>10,.0f}{row['high']:>10,.0f}"
            f"{row['peak_memory'] / 2**20:>10,.0f} MiB"
        )


def growth(options: BenchmarkOptions) -> dict:
    """Measures and prints speed and memory at several batch sizes, depths and data sizes."""
    tables = {}
    for what, values in GROWTH.items():
        with Contest(options) as contest:
            for value in values:
                settings = {"what": "step", what: value}
                if what == "depth":
                    settings = {"what": "step", "model": f"resnet{value}"}
                if what == "images":
                    settings = {"what": "pipeline", "data": None, what: value}
                contest.add(f"{value:,}", "ours", **settings)
            tables[what] = contest.take_turns()
        _print_table(what, "images/s", 12, tables[what])
        print(flush=True)
    return tables


def distribute(options: BenchmarkOptions) -> dict:
    """Measures and prints the cost of replicas and processes, and the prediction for many GPUs."""
    from keras_cifar import models
    from keras_cifar.benchmarking import distribution

    rates = distribution.measure(options, _our_environment(), _say)
    measured = {name: _spread(values) for name, values in rates.items()}
    base = measured["one device"]["median"]
    print(f"{'images a second':<34}{'median':>10}{'low':>10}{'high':>10}{'of one':>10}")
    for name, row in measured.items():
        share = row["median"] / base
        print(
            f"{name:<34}{row['median']:>10,.0f}{row['low']:>10,.0f}{row['high']:>10,.0f}{share:>10.2f}"
        )
    size = models.variants()[options.model].image_size
    model = models.build(
        options.model, (size, size, 3), models.variants()[options.model].num_classes
    )
    found, network = distribution.traffic(model), model.deployable
    print(f"\na step all-reduces {found.bytes:,} bytes in {found.collectives} collectives")
    figures = (found, models.count_multiply_adds(network), len(network.layers), size * size)
    print(f"\npredicted for A100s with {options.batch_size} images of {size} x {size} each")
    print(f"{'GPUs':>6}{'compute, ms':>13}{'ring, ms':>10}{'tree, ms':>10}{'ring':>14}{'tree':>14}")
    predicted = {}
    for gpus in distribution.PREDICTED_GPUS:
        row = predicted[gpus] = distribution.predict(*figures, options.batch_size, gpus)
        efficiency = {
            k: row[f"{k}_rate"] / gpus / predicted[1]["ring_rate"] for k in ("ring", "tree")
        }
        print(
            f"{gpus:>6}{1e3 * row['compute']:>13.2f}{1e3 * row['ring']:>10.2f}"
            f"{1e3 * row['tree']:>10.2f}"
            + "".join(f"{row[f'{k}_rate']:>9,.0f}{e:>5.0%}" for k, e in efficiency.items())
        )
    return {"measured": measured, "traffic": dataclasses.asdict(found), "predicted": predicted}


def serve(options: BenchmarkOptions) -> dict:
    """Measures and prints requests a second and their latency, of one picture each."""
    from keras_cifar.benchmarking import serving

    figures = serving.measure(options, _our_environment(), _say)
    print(f"{options.model}, one picture a request, {options.data}")
    print(f"\n{'':<28}{'clients':>8}{'requests/s':>12}{'p50, ms':>10}{'p99, ms':>10}")
    for name, rows in figures.items():
        for clients, row in rows.items():
            print(
                f"{name:<28}{clients:>8}{row['rate']:>12,.0f}"
                f"{1e3 * row['p50']:>10.1f}{1e3 * row['p99']:>10.1f}"
            )
    return figures


if __name__ == "__main__":
    cli.run("benchmark", main, BenchmarkOptions, __doc__)
