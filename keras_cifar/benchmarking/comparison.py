"""The training step, `fit`, the input pipeline and prediction, beside what other frameworks reach."""

import pathlib
import tempfile
import time

from keras_cifar.benchmarking.contest import (
    Contest,
    columns,
    percentages,
    print_table,
    run_python,
    show,
    spread,
)
from keras_cifar.benchmarking.options import BenchmarkOptions

STEP, FIT, PIPELINE, PREDICT = "training step", "whole fit", "input pipeline", "prediction"
GEMM = "matrix multiply, GFLOP/s"
PLAIN, PLAIN_PREDICT = "plain Keras", "plain Keras, prediction"

PREDICTED = 10_000  # images, as many as CIFAR-10's test split
SLOWER = 0.95  # a rate below this share of another one is lower by more than chance
ARITHMETIC = 0.6  # from this share of the matrix-multiply rate on, little but arithmetic is left


def measure(options: BenchmarkOptions, flops: int) -> dict:
    """Measures and prints; `flops` are the operations of a training step for each image."""
    with tempfile.TemporaryDirectory() as scratch, Contest(options) as contest:
        export = pathlib.Path(scratch) / "export"
        _add_ours(contest, export)
        # Some machines name an older CPU to OpenBLAS, which halves its rate.
        contest.add(GEMM, "gemm", {"OPENBLAS_CORETYPE": None})
        if options.peers:
            _add_peers(contest)
        measured = contest.take_turns()
        cold = cold_start(options.rounds, export)
        shares = contest.kernel_shares()
    fraction = measured[STEP]["median"] * flops / 1e9 / measured[GEMM]["median"]
    limit = bound(measured, fraction, shares)
    _print(options, measured, cold)
    print(f"{fraction:>8.2f}  training step / matrix multiply")
    print(f"\ntime of the step's kernels: {percentages(shares)}\nbound by {limit}")
    return {
        "figures": measured,
        "cold_start": cold,
        "flops_an_image": flops,
        "fraction_of_matrix_multiply": fraction,
        "shares": shares,
        "bound": limit,
    }


def _add_ours(contest: Contest, export: pathlib.Path) -> None:
    step, options = contest.add(STEP, "ours", what="step"), contest.options
    if step.error:
        raise RuntimeError(step.error)
    images = step.turn()["rate"] * options.seconds
    step.turns.clear()
    contest.add(FIT, "ours", what="fit", steps=max(3, round(images / options.batch_size)))
    contest.add(PIPELINE, "ours", what="pipeline")
    contest.add(PREDICT, "ours", what="predict", export=str(export), warm_up=1, count=PREDICTED)


def _add_peers(contest: Contest) -> None:
    float32 = {"dtype_policy": "float32"}
    without = {"TF_ENABLE_ONEDNN_OPTS": "0"}
    contest.add("plain Keras without oneDNN", "plain_keras", without, what="step", **float32)
    contest.add("PaddlePaddle", "paddlepaddle", **float32)
    predict = {"what": "predict", "warm_up": 1, "count": PREDICTED}
    contest.add(PLAIN_PREDICT, "plain_keras", **predict, **float32)
    precisions = {"": float32}
    if contest.options.dtype_policy == "mixed_bfloat16":
        precisions[", bfloat16"] = {}
    for suffix, precision in precisions.items():
        contest.add(PLAIN + suffix, "plain_keras", what="step", **precision)
        for kind, compile in (("PyTorch eager", False), ("torch.compile", True)):
            for layout in ("", ", channels last"):
                memory = {"compile": compile, "channels_last": bool(layout)}
                contest.add(kind + layout + suffix, "pytorch", **memory, **precision)


def cold_start(rounds: int, export: pathlib.Path) -> dict:
    """Seconds of `predict` for one image and of importing TensorFlow, each in a new process."""
    import numpy as np
    from PIL import Image

    image = export.parent / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    commands = {
        "predict": ["-m", "keras_cifar.predict", f"--model={export}", str(image)],
        "import": ["-c", "import tensorflow"],
    }
    seconds = {name: [] for name in commands}
    for number in range(rounds + 1):
        show(f"cold start {number} of {rounds}")
        for name, command in commands.items():
            start = time.perf_counter()
            run_python(*command)
            if number:  # The first fills the disk's cache.
                seconds[name].append(time.perf_counter() - start)
    show("")
    return {name: spread(values) for name, values in seconds.items()}


def bound(measured: dict, fraction: float, shares: dict) -> str:
    """A sentence that says what limits the speed of training.

    `fraction` is that of the matrix-multiply rate that the step reaches, and `shares` are those of
    each kind of kernel in the time of a step, the largest first.
    """
    step, fit, pipe = (measured[name]["median"] for name in (STEP, FIT, PIPELINE))
    if pipe < step:
        return f"the input pipeline: {pipe:,.0f} images a second, while the step takes {step:,.0f}"
    if fit < SLOWER * step:
        return (
            f"what surrounds the step: fit has {fit / step:.2f} of its rate, while the pipeline alone "
            f"is {pipe / step:.0f} times faster; larger batches help"
        )
    kind, share = next(iter(shares.items()), ("unknown kernels", 0.0))
    small = "memory and small kernels more than arithmetic"
    return (
        f"{'arithmetic' if fraction >= ARITHMETIC else small}: the step reaches {fraction:.2f} of the "
        f"matrix-multiply rate, {share:.0%} of its kernels' time is {kind}"
    )


def _print(options: BenchmarkOptions, measured: dict, cold: dict) -> None:
    print(f"{options.model}, batches of {options.batch_size}", end=", ")
    print(f"{options.dtype_policy}, {options.data}", end="\n\n")
    print_table("images a second", "median", 40, measured)
    for name, title in (("predict", "predict one image, s"), ("import", "import tensorflow, s")):
        print(f"{title:<40}{columns(cold[name], 2)}")
    print("\nratios of medians")
    ours = (STEP, FIT, PIPELINE, PREDICT, GEMM)
    pairs = [(FIT, STEP), (PIPELINE, STEP)]
    pairs += [
        (PREDICT if name == PLAIN_PREDICT else STEP, name) for name in measured if name not in ours
    ]
    for mine, other in pairs:
        ratio = measured[mine]["median"] / measured[other]["median"]
        print(f"{ratio:>8.2f}  {mine} / {other}")
    print(f"{cold['predict']['median'] - cold['import']['median']:>8.2f}  s more than the import")
