"""The strategy of a run: one device, replicas on several devices, or workers on several machines."""

import contextlib
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_cifar.core import environment
from keras_cifar.core.config import DevicesConfig
from keras_cifar.core.errors import LostWorkerError, UsageError, UserError, reason
from keras_cifar.distributed import exchange
from keras_cifar.distributed.cluster import Cluster, find_cluster
from keras_cifar.distributed.rendezvous import Rendezvous

# Gradients are all-reduced in packs of so many bytes, the first while the backward pass continues.
# CPU: the fastest of BUILD_NOTES' measurement. GPU: the buckets of PyTorch's DistributedDataParallel
# (Li et al. 2020, arXiv:2006.15704); not measured here.
PACK_BYTES = {"CPU": 4 * 2**20, "GPU": 25 * 2**20}
BROADCAST_BYTES = 2**22  # of one collective: large for speed, small enough for --peer_timeout
# How long TensorFlow's servers may look for each other: this share of --peer_timeout, and at least so
# long. Their workers have just met, and take up to 12 s to notice and report a lost one.
CONNECT_SHARE, MIN_CONNECT_SECONDS = 0.75, 30.0
ANSWER_SECONDS = 5.0  # for which a worker may not answer, while another has waited for it

# What TensorFlow raises when another worker has ended, is stuck, or was restarted.
LOST_WORKER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
)
# What it raises then, and also when this worker's own device fails.
AMBIGUOUS_ERRORS = (
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
)
# What the message is about where it is about other workers; see also their tasks.
COMMUNICATION = re.compile(r"collective|coordination|rpc|peer|socket|_Derived_|RecvBuf", re.I)


@dataclasses.dataclass(frozen=True)
class StrategySpec:
    """The devices that a run computes on, before anything is started."""

    name: str  # none, mirrored or multiworker
    reason: str  # why this one was chosen
    devices: tuple[str, ...]  # those of this process, such as GPU:0
    cluster: Cluster | None = None  # for multiworker

    @property
    def replicas(self) -> int:
        """The number of replicas in all processes, if each worker has as many devices as this one."""
        return len(self.devices) * (len(self.cluster.addresses) if self.cluster else 1)


def choose(config: DevicesConfig) -> StrategySpec:
    """Chooses the strategy of a run from --strategy, --replicas, --workers and the environment.

    Raises:
        UsageError: the flags contradict each other or the machine.
    """
    name, replicas = config.strategy, config.replicas
    cluster = find_cluster(config) if name in ("auto", "multiworker") else None
    gpus = len(tf.config.list_physical_devices("GPU"))
    if name in ("none", "mirrored") and config.workers:
        raise UsageError(f"--workers needs --strategy=multiworker or auto, not {name}")
    if name == "multiworker" and cluster is None:
        raise UsageError(
            "--strategy=multiworker found no cluster: give --workers and --worker_index, or set "
            "TF_CONFIG, or start with srun, or on one machine with python -m keras_cifar.launch"
        )
    if cluster and (name == "multiworker" or len(cluster.addresses) > 1):
        if replicas:
            raise UsageError("--replicas is for one machine: a worker has one for each of its GPUs")
        devices = tuple(f"GPU:{i}" for i in range(gpus)) or ("CPU:0",)
        kind = _count(gpus, "GPU") if gpus else "the CPU"
        workers = f"{len(cluster.addresses)} workers by {cluster.source}"
        why = f"{workers}, this is {cluster.index}, {kind}"
        return StrategySpec("multiworker", why, devices, cluster)
    device = "GPU" if gpus else "CPU"
    wanted = replicas or max(gpus, 1)
    if name == "auto":
        name = "mirrored" if wanted > 1 else "none"
    if name == "none":
        if (replicas or 1) > 1:
            raise UsageError(f"--replicas={replicas} needs --strategy=mirrored or auto")
        return StrategySpec("none", "one GPU" if gpus else "the CPU", (f"{device}:0",))
    if gpus and wanted > gpus:
        raise UsageError(f"--replicas={wanted} is more than this machine's {gpus} GPUs")
    why = _count(wanted, "GPU" if gpus else "virtual CPU device")
    return StrategySpec("mirrored", why, tuple(f"{device}:{i}" for i in range(wanted)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


class DistributedContext:
    """A started strategy. As a context manager it ends the other workers when this one fails.

    Attributes:
        spec: the devices.
        strategy: the tf.distribute.Strategy.
    """

    def __init__(
        self,
        spec: StrategySpec,
        config: DevicesConfig,
        facts: Mapping | None = None,
        start: bool = True,
    ):
        """Starts the strategy; call it before TensorFlow computes anything.

        Args:
            facts: JSON values by name, which must be equal in all workers.
            start: False is for a dry run: one device, and no other worker is waited for.

        Raises:
            UsageError, UserError: another worker is missing or differs, or a port is in use.
        """
        self.spec, self._timeout = spec, config.peer_timeout
        self._rendezvous, self._training = None, False
        self._exchange: exchange.Exchange | None = None
        if not start or spec.name == "none":
            self.strategy = tf.distribute.get_strategy()
        elif spec.cluster is None:
            if spec.devices[0].startswith("CPU"):
                _split_cpu(len(spec.devices))
            self.strategy = tf.distribute.MirroredStrategy(list(spec.devices))
        else:
            workers, limits = spec.cluster, (config.startup_timeout, config.peer_timeout)
            self._rendezvous = Rendezvous(workers.addresses, workers.index, *limits)
            with contextlib.ExitStack() as stack:
                stack.push(self)  # where this worker fails
                self.check_equal(facts or {})
                self.strategy = _multiworker(workers, spec.devices, config.peer_timeout)
                stack.pop_all()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run directory."""
        return self.spec.cluster is None or self.spec.cluster.index == 0

    def check_equal(self, facts: Mapping) -> None:
        """Waits for all workers; raises UserError if a value differs from the chief's.

        The names are the same in all workers.
        """
        if self._rendezvous is None or self.spec.cluster is None:
            return
        everyone = self.all_gather(dict(facts))
        for index, theirs in enumerate(everyone):
            differences = [
                f"{name} is {theirs.get(name)!r} there and {value!r} at worker 0"
                for name, value in everyone[0].items()
                if theirs.get(name) != value
            ]
            if differences:
                name = self.spec.cluster.name(index)
                raise UserError(f"{name} differs: {'; '.join(differences)}")

    def all_gather(self, value) -> list:
        """The JSON values that all workers give, the chief's first; waits for them."""
        return self._rendezvous.all_gather(value) if self._rendezvous else [value]

    def broadcast(self, data: bytes) -> bytes:
        """Returns the chief's `data` in every worker."""
        if self._rendezvous is None:
            return data
        if not self._training:
            self.check_equal({})  # If the chief has failed by now, this reports it at once.
        size = int.from_bytes(self._all_reduce(len(data).to_bytes(8, "little"), 8), "little")
        return self._all_reduce(data, size)

    def _all_reduce(self, data: bytes, size: int) -> bytes:
        """Adds up the chief's `data`, of a size that all know, and the zeros of the others."""
        # As float32, which every kind of device can add up, and of bytes exactly.
        chief = np.zeros(size, np.uint8)
        if self.is_chief:
            chief[:] = np.frombuffer(data, np.uint8)

        @tf.function(autograph=False)
        def add(values):
            def on_replica():
                context = tf.distribute.get_replica_context()
                first = tf.cast(tf.equal(context.replica_id_in_sync_group, 0), tf.float32)
                return context.all_reduce("SUM", tf.cast(values, tf.float32) * first)

            return self.strategy.experimental_local_results(self.strategy.run(on_replica))[0]

        starts = range(0, size, BROADCAST_BYTES)
        sums = [add(tf.constant(chief[i : i + BROADCAST_BYTES])).numpy() for i in starts]
        return b"".join(chunk.astype(np.uint8).tobytes() for chunk in sums)

    def connect_sums(self) -> None:
        """Connects workers that have one CPU each for the sums of --norm_batch=whole."""
        if not self._rendezvous or self._exchange:
            return
        if all(self.all_gather(self.spec.devices == ("CPU:0",))):
            self._exchange = exchange.connect(self._rendezvous, self._timeout, _check_worker)
            if self._exchange:
                self._exchange.serve(self.strategy)
            elif self.is_chief:
                text = (
                    "a worker cannot reach a second port of worker 0: --norm_batch=whole is slower"
                )
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def begin_training(self) -> None:
        """Ends the rendezvous; from here on TensorFlow detects lost workers."""
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._training = True

    def __enter__(self) -> "DistributedContext":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._exchange:
            if isinstance(error, LOST_WORKER_ERRORS + AMBIGUOUS_ERRORS):
                self._exchange.look()
            self._exchange.close()
            if self._exchange.failure and isinstance(error, tf.errors.OpError):
                error = self._exchange.failure  # TensorFlow says that some Python function failed.
        if error is None or self._rendezvous is None or self.spec.cluster is None:
            return
        cluster = self.spec.cluster
        if not isinstance(error, LOST_WORKER_ERRORS + AMBIGUOUS_ERRORS):
            self._rendezvous.abort(reason(error))
            return
        if is_own_failure(error, cluster):
            mine = cluster.name(cluster.index)
            why = f"{mine} itself failed: {_cause(error)}; nothing that was saved is lost"
        else:
            # Before training the other worker has told the rendezvous why it ended.
            told = None if self._training else self._rendezvous.failure()
            why = told or describe_lost_worker(error, cluster, self._timeout)
        self._rendezvous.abort(why)
        raise LostWorkerError(why) from error


def is_own_failure(error: tf.errors.OpError, cluster: Cluster) -> bool:
    """Whether an error is about this worker's own device and not about another worker."""
    others = {int(n) for n in re.findall(r"/task:(\d+)", error.message)} - {cluster.index}
    about_others = others or COMMUNICATION.search(error.message)
    return isinstance(error, AMBIGUOUS_ERRORS) and not about_others


def _cause(error: tf.errors.OpError) -> str:
    """The line of TensorFlow's message that says what went wrong."""
    noise = ("Graph execution error", "Detected at node", "<stack traces", "File ", "[[")
    lines = [line.strip() for line in error.message.splitlines()]
    return next((x for x in lines if x and not x.startswith(noise)), reason(error))


def describe_lost_worker(error: tf.errors.OpError, cluster: Cluster, timeout: float) -> str:
    """Says in one line which worker TensorFlow's error is about, and what to do."""
    others = set(range(len(cluster.addresses))) - {cluster.index}
    # While workers connect, TensorFlow lists those that did and then those that did not.
    _, absent, text = error.message.rpartition("timed out task")
    tasks = {int(n) for n in re.findall(r"/task:(\d+)", text)} & others
    late = "timed out" in error.message and not absent
    if late:
        tasks = others if len(others) == 1 else set()
    elif not tasks and "CoordinationService" in error.message:
        tasks = {0}  # The chief runs it.
    names = [cluster.name(i) for i in sorted(tasks)]
    who = " and ".join(names) or ("a worker" if late else "another worker")
    why = "ended or cannot be reached"
    if late:
        why = f"kept the others waiting for more than --peer_timeout={timeout:g} s"
    line = (
        f"{who} {why}; nothing that was saved is lost: start all workers again to resume from there"
    )
    # An error that another worker seldom causes may have another cause after all.
    return f"{line} ({_cause(error)})" if isinstance(error, AMBIGUOUS_ERRORS) else line


def _multiworker(
    cluster: Cluster, devices: tuple[str, ...], timeout: float
) -> tf.distribute.Strategy:
    gpus = sum(device.startswith("GPU") for device in devices)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )
    _limit_start(cluster, timeout)
    # Without a limit, collectives wait forever for a worker that is alive but stuck.
    options = tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=PACK_BYTES["GPU" if gpus else "CPU"], timeout_seconds=timeout
    )
    handler = signal.getsignal(signal.SIGTERM)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    if threading.current_thread() is threading.main_thread():
        # TensorFlow's own handler would ignore the signal with which launchers end a process.
        signal.signal(signal.SIGTERM, handler)
    return strategy


def _check_worker(index: int) -> None:
    """Raises an OpError if the worker's process does not answer within ANSWER_SECONDS."""
    # The strategy's own thread that does this is off with the coordination service.
    from tensorflow.python.eager import context

    task = f"/job:worker/replica:0/task:{index}"
    context.context().check_collective_ops_peer_health(task, int(1000 * ANSWER_SECONDS))


def _limit_start(cluster: Cluster, timeout: float) -> None:
    """Limits how long TensorFlow's servers look for each other.

    The default is an hour, in which Python cannot run: neither Ctrl-C nor a failure is noticed.
    """
    # The strategy has no argument for it, but respects this configuration, which is private.
    from tensorflow.python.eager import context

    seconds = max(MIN_CONNECT_SECONDS, CONNECT_SHARE * timeout)
    job = context.coordination_config_pb2.CoordinatedJob(
        name="worker", num_tasks=len(cluster.addresses)
    )
    tensorflow = context.context()
    tensorflow.configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[job],
        cluster_register_timeout_in_ms=int(1000 * seconds),
    )
    tensorflow.coordination_service.cluster_register_with_barrier = True


def _split_cpu(count: int) -> None:
    virtual = [tf.config.LogicalDeviceConfiguration()] * count
    try:
        environment.separate_devices(count)
        tf.config.set_logical_device_configuration(tf.config.get_visible_devices("CPU")[0], virtual)
    except RuntimeError:
        # TensorFlow has started already, which is fine if it has enough devices.
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError(
                f"--replicas={count} must be chosen before TensorFlow starts computing"
            ) from None
