"""All switches of TensorFlow and Keras that this package sets, and why.

| switch | default | why |
|---|---|---|
| `TF_ENABLE_ONEDNN_OPTS` | 1 | TensorFlow enables oneDNN by itself only on CPUs with AVX-512 VNNI \
or newer; it is 1.7 to 3 times faster on other CPUs too |
| `TF_CPP_MIN_LOG_LEVEL` | 3 | hides start-up messages; import_tensorflow hides the rest |
| `KERAS_BACKEND` | tensorflow | the code writes TensorFlow graphs |
| `TF_NUM_INTRAOP_THREADS`, `TF_NUM_INTEROP_THREADS` | the CPU quota of a container, if it is \
below the number of cores | TensorFlow counts cores, and threads above the quota are throttled |
| `TF_NUM_INTRAOP_THREADS`, `TF_NUM_INTEROP_THREADS`, `CUDA_VISIBLE_DEVICES` of workers that \
`launch` starts on one machine | equal shares of its CPUs (but two inter-op threads or more) and \
visible GPUs | each would take all |
| TensorFlow's intra-op threads; malloc, where `--replicas` makes as many virtual CPU devices as there \
are threads, or more | 1; one arena that keeps its memory | devices that share threads wait for each \
other: ResNet-32 on two has 1.15 times the speed without |
| XLA, `--xla=auto` | off | on a CPU it slows convolutions (ResNet-32: 0.4 of the speed), it was not \
measured on a GPU, and Keras 3 fails with it under a strategy, where `--xla=on` is refused |
| `tf.config.experimental.enable_op_determinism` | off | `--deterministic` turns it on for GPUs; on a \
CPU the training step has the same bits without it, and with it tf.data copies all images |
| `--dtype_policy=auto` | mixed_bfloat16 on GPUs with bfloat16 tensor cores and on CPUs that convolve \
faster with it, else float32 | 1.3 to 2 times the speed there; a third of it on CPUs without bfloat16 \
instructions |

The first five rows are environment variables. They are set before TensorFlow is imported, and only if
the user has not set them. TensorFlow chooses the number of threads otherwise, one per core; one
inter-op thread and larger malloc thresholds were not faster.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import pathlib
import re
import sys
import tempfile
import time

from keras_cifar.core.errors import UsageError
from keras_cifar.core.signals import STOP

DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "KERAS_BACKEND": "tensorflow",
}
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")

# Linux: microseconds of CPU time that a container may use in each period.
CPU_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")

# Linux: the CPUs with their instructions.
CPU_INFO = pathlib.Path("/proc/cpuinfo")

# Compute capability of NVIDIA's Ampere, the first GPUs with bfloat16 tensor cores.
BFLOAT16_CAPABILITY = (8, 0)

# How many times as fast as in float32 a CPU convolves in bfloat16: 1.6 with AVX512-BF16 (2 cores of an
# AMD EPYC), 0.33 there if oneDNN may not use it.
MIN_BFLOAT16_GAIN = 1.2
# What `auto` is on a CPU for networks with depthwise convolutions, and why. In bfloat16
# EfficientNet-Lite0 trains at 0.54 of float32's speed and predicts at 0.78, MobileNetV3-Small at 0.50
# and 0.61.
DEPTHWISE_POLICY = "float32", "its depthwise convolutions are slower in bfloat16"

# Parameters of glibc's mallopt, by their numbers there: one arena (-8), which neither gives memory
# back (-1) nor takes that of large tensors elsewhere (-3). Else two devices wait for pages to map:
# vgg_bn_drop had 0.85 of one device's speed instead of 0.93.
MALLOC = {-8: 1, -1: 2**31 - 1, -3: 2**31 - 1}

# Added to the "nice" value of what computes beside an event loop, which then need not wait for a core.
# Readiness of `serve` took at most 46 ms in four minutes of load with 10, and 91 with 5 (99 %: 17 and
# 22). Requests a second were as many with 5, 10 and 19.
NICE = 10

# The variables that `configure` has set in this process.
changed: set[str] = set()


def configure() -> None:
    """Sets the environment variables that the user has not set."""
    defaults, cpus = dict(DEFAULTS), usable_cpus()
    if cpus < len(os.sched_getaffinity(0)):
        defaults |= dict.fromkeys(THREADS, str(cpus))
    for name in defaults.keys() - os.environ.keys():
        os.environ[name] = defaults[name]
        changed.add(name)


def cpu_quota() -> int | None:
    """The CPUs that the container of this process may use, rounded up; None without a limit."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def usable_cpus() -> int:
    """The CPUs that this process may use; a container may have a share of more CPUs than that."""
    cpus = len(os.sched_getaffinity(0))
    return min(cpus, cpu_quota() or cpus)


def give_way() -> None:
    """Gives this thread, and the threads that it starts, a lower priority than the event loop has.

    Only for what does not hold Python's lock: the event loop would wait for a thread without a core.
    """
    with contextlib.suppress(OSError):  # A sandbox may forbid it.
        os.nice(NICE)  # on Linux of the thread alone


def intra_op_threads() -> int:
    """The threads with which TensorFlow computes an operation, unless it is told otherwise."""
    given = os.environ.get(THREADS[0], "")  # 0 means one for each CPU, too
    return (int(given) if given.isdecimal() else 0) or len(os.sched_getaffinity(0))


def separate_devices(count: int) -> None:
    """Lets `count` virtual CPU devices compute on a thread each, if there are no more threads.

    Raises RuntimeError if TensorFlow has started already.
    """
    import tensorflow as tf

    if intra_op_threads() > count:
        return
    tf.config.threading.set_intra_op_parallelism_threads(1)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        for parameter, value in MALLOC.items():
            library.mallopt(parameter, value)


def package_environment() -> dict[str, str]:
    """The environment in which `-m keras_cifar...` finds this very package."""
    root = pathlib.Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def shares(count: int) -> list[dict[str, str]]:
    """The environment of each of `count` workers on this machine: equal shares of CPUs and GPUs.

    Raises UsageError if the machine has GPUs, but fewer than workers.
    """
    # TF_CONFIG may describe another cluster.
    common = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    threads = max(1, usable_cpus() // count)
    # A second inter-op thread sends and receives while the other computes. ResNet-32 in two processes
    # of one intra-op thread: 237 against 194 images/s.
    for name, number in zip(THREADS, (threads, max(2, threads)), strict=True):
        if name not in common or name in changed:
            common[name] = str(number)
    gpus = visible_gpus()
    if not gpus:
        return [common] * count
    if len(gpus) < count:
        raise UsageError(
            f"{count} workers need a GPU each, and this machine shows {len(gpus)}; "
            "CUDA_VISIBLE_DEVICES= before the command hides them all"
        )
    size = len(gpus) // count  # all get the same number, as the strategy demands
    starts = range(0, size * count, size)
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i : i + size])} for i in starts]


def visible_gpus() -> list[str]:
    """CUDA's names of the GPUs that a process would see; empty if there are none or it is unknown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA ignores the first invalid name and all names after it.
        valid = re.compile(r"\d+|(GPU|MIG)-.+").fullmatch
        return list(itertools.takewhile(valid, map(str.strip, visible.split(","))))
    import subprocess  # only here, as every command imports this module

    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, re.M) if listed.returncode == 0 else []


def use_xla(choice: str, strategy: str) -> tuple[bool, str]:
    """(whether XLA compiles the training step, why) for `--xla=choice` under the strategy of that name.

    Raises UsageError if the strategy excludes it.
    """
    import tensorflow as tf

    if choice == "on" and strategy != "none":
        raise UsageError(
            f"--xla=on is for one device, as Keras 3 fails with XLA under the strategy {strategy}; "
            "use --xla=auto"
        )
    if choice != "auto":
        return choice == "on", "by --xla"
    if strategy != "none":
        return False, "several replicas"
    if tf.config.list_physical_devices("GPU"):
        return False, "not measured on a GPU; --xla=on turns it on"
    return False, "it slows convolutions on a CPU"


def make_deterministic(wanted: bool) -> bool:
    """Makes TensorFlow's kernels on GPUs deterministic if `wanted`; whether training is so now."""
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # The kernels that we use are deterministic on a CPU; the switch makes tf.data copy all images.
        return True
    if wanted:
        tf.config.experimental.enable_op_determinism()
    return wanted


def dtype_policy(name: str, began_with: str | None = None) -> tuple[str, str]:
    """(the Keras dtype policy of `--dtype_policy=name` on this machine, why).

    Args:
        began_with: the policy of the run that is resumed, which `auto` keeps.

    Raises:
        UsageError: this CPU has no kernels for bfloat16.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    chosen = began_with if name == "auto" else name
    if chosen:
        why = "as the run began" if name == "auto" else "by --dtype_policy"
        gain = bfloat16_gain() if chosen == "mixed_bfloat16" and not gpus else math.inf
        if not gain:
            raise UsageError(
                f"this CPU has no kernels for {chosen}, {why}; train on one with AVX-512, or begin a "
                "run with --dtype_policy=float32"
            )
        slow = f", {gain:.1f} of float32's speed on this CPU" if gain < 1 else ""
        return chosen, why + slow
    if not gpus:
        gain = bfloat16_gain()
        if gain < MIN_BFLOAT16_GAIN:
            return "float32", "the CPU is not faster in bfloat16"
        return "mixed_bfloat16", f"the CPU convolves {gain:.1f} times as fast in bfloat16"
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    capable = [d.get("compute_capability", (0, 0)) >= BFLOAT16_CAPABILITY for d in details]
    if all(capable):
        return "mixed_bfloat16", "all GPUs have bfloat16 tensor cores"
    return "float32", "a GPU has no bfloat16 tensor cores"


@functools.cache
def cpu_has(flag: str) -> bool:
    """Whether Linux names an instruction set of this CPU, such as avx512_bf16; elsewhere False."""
    with contextlib.suppress(OSError):
        return flag in CPU_INFO.read_text().split()
    return False


@functools.cache
def bfloat16_gain() -> float:
    """Measures how many times as fast as in float32 this CPU trains a convolution in bfloat16.

    It takes 0.2 s. CPUs with AVX-512 but without bfloat16 instructions emulate them, which no list of
    their flags tells for each version of oneDNN; older ones have no kernel at all, and the result is 0.
    """
    import tensorflow as tf

    def kernels(dtype: str):
        x, w = tf.ones((32, 16, 16, 64), dtype), tf.ones((3, 3, 64, 64), dtype)
        options = {"strides": [1, 1, 1, 1], "padding": "SAME"}

        @tf.function(autograph=False)
        def forward_and_gradients():
            y = tf.raw_ops.Conv2D(input=x, filter=w, **options)
            to_x = {"input_sizes": x.shape, "filter": w, "out_backprop": y}
            to_w = {"input": x, "filter_sizes": w.shape, "out_backprop": y}
            return (
                tf.raw_ops.Conv2DBackpropInput(**to_x, **options),
                tf.raw_ops.Conv2DBackpropFilter(**to_w, **options),
            )

        forward_and_gradients()  # traces
        return forward_and_gradients

    def seconds(function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    with tf.device("CPU:0"):
        try:
            functions = kernels("float32"), kernels("bfloat16")
        except tf.errors.OpError:
            return 0.0
        rounds = [[seconds(function) for function in functions] for _ in range(5)]
    float32, bfloat16 = map(min, zip(*rounds, strict=True))
    return float32 / bfloat16


def import_tensorflow() -> None:
    """Imports TensorFlow and hides its start-up messages unless TF_CPP_MIN_LOG_LEVEL is below 3.

    The level alone does not: some lines (oneDNN, missing CUDA) are written before it takes effect.
    """
    if "tensorflow" in sys.modules:
        return
    quiet = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == DEFAULTS["TF_CPP_MIN_LOG_LEVEL"]
    with _silent_stderr() if quiet else contextlib.nullcontext():
        import tensorflow as tf

        # TensorFlow reports a missing driver when it first looks for GPUs.
        tf.config.list_physical_devices()
    if quiet:
        tf.get_logger().setLevel("ERROR")


@contextlib.contextmanager
def _silent_stderr():
    """Holds back what the process writes to stderr; prints it only if the body fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            if not STOP.received:  # Imports make other errors of a stop.
                held.seek(0)
                os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def machine() -> str:
    """The processors that this process may use, as text."""
    import tensorflow as tf

    model = "unknown CPU"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    gpus = len(tf.config.list_physical_devices("GPU"))
    return f"{usable_cpus()} cores of {model}, {gpus} GPUs"
