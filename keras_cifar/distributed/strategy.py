"""Where a run computes: one device, replicas on several, or workers on several machines."""

import dataclasses
import re
import signal
import threading
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_cifar.core.config import DevicesConfig
from keras_cifar.core.errors import LostWorkerError, UsageError, UserError, reason
from keras_cifar.distributed.cluster import Cluster, find_cluster
from keras_cifar.distributed.rendezvous import Rendezvous

# Bytes of one broadcast: large enough to be fast, small enough for --peer_timeout.
BROADCAST_BYTES = 2**22


# How long TensorFlow's servers may look for each other: a share of --peer_timeout, and at least. They
# have just met, and what ends is noticed and said up to 12 s later.
MEET_SHARE, MEET_SECONDS = 0.75, 30.0


# How TensorFlow reports that another worker is gone, stuck or restarted.
LOST_WORKER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
)


@dataclasses.dataclass(frozen=True)
class StrategySpec:
    """What a run computes on; nothing has been started.

    Attributes:
        name: none, mirrored or multiworker.
        reason: why it was chosen.
        devices: of this process.
        cluster: of multiworker.
    """

    name: str
    reason: str
    devices: tuple[str, ...]
    cluster: Cluster | None = None

    @property
    def replicas(self) -> int:
        """In all processes; each worker is taken to have as many devices as this one."""
        return len(self.devices) * (len(self.cluster.addresses) if self.cluster else 1)


def choose(config: DevicesConfig) -> StrategySpec:
    """Chooses the strategy of a run from --strategy, --replicas, --workers and the environment.

    Raises:
        UsageError: the machine cannot do what was asked for.
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
        kind = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
        why = (
            f"{len(cluster.addresses)} workers by {cluster.source}, this is {cluster.index}, {kind}"
        )
        return StrategySpec("multiworker", why, devices, cluster)
    wanted = replicas or max(gpus, 1)
    if name == "auto":
        name = "mirrored" if wanted > 1 else "none"
    if name == "none":
        if (replicas or 1) > 1:
            raise UsageError(f"--replicas={replicas} needs --strategy=mirrored or auto")
        return StrategySpec(
            "none", "one GPU" if gpus else "the CPU", ("GPU:0" if gpus else "CPU:0",)
        )
    if gpus and wanted > gpus:
        raise UsageError(f"--replicas={wanted} is more than this machine's {gpus} GPUs")
    kind = "GPU" if gpus else "virtual CPU device"
    devices = tuple(f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(wanted))
    return StrategySpec("mirrored", f"{wanted} {kind}{'s' if wanted > 1 else ''}", devices)


class DistributedContext:
    """A spec that was started; a context that ends the other workers when this one fails.

    Attributes:
        spec: what was chosen.
        strategy: TensorFlow's.
    """

    def __init__(
        self,
        spec: StrategySpec,
        config: DevicesConfig,
        facts: Mapping | None = None,
        start: bool = True,
    ):
        """Starts the spec; call it before TensorFlow computes anything.

        Args:
            facts: what all workers must have in common, by name; JSON.
            start: False joins nobody and has the strategy of one device, to look at a plan.

        Raises:
            UsageError, UserError: another worker is missing or differs, or a port is taken.
        """
        self.spec, self._timeout = spec, config.peer_timeout
        cluster = spec.cluster
        self._rendezvous, self._training = None, False
        if not start:
            self.strategy = tf.distribute.get_strategy()
            return
        if cluster is None:
            self.strategy = _one_machine(spec)
            return
        self._rendezvous = Rendezvous(
            cluster.addresses, cluster.index, config.startup_timeout, config.peer_timeout
        )
        with self:
            self.check_equal(facts or {})
            self.strategy = _multiworker(spec, config.peer_timeout)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes."""
        return self.spec.cluster is None or self.spec.cluster.index == 0

    def check_equal(self, facts: Mapping) -> None:
        """Waits for all workers and compares; each gives the same names.

        Raises:
            UserError: a value differs from the chief's.
        """
        if self._rendezvous is None:
            return
        everyone = self._rendezvous.all_gather(dict(facts))
        for index, theirs in enumerate(everyone):
            differences = [
                f"{name} is {theirs.get(name)!r} there and {value!r} at worker 0"
                for name, value in everyone[0].items()
                if theirs.get(name) != value
            ]
            if differences:
                raise UserError(
                    f"worker {index} ({self.spec.cluster.addresses[index]}) differs: "
                    f"{'; '.join(differences)}"
                )

    def broadcast(self, data: bytes) -> bytes:
        """The chief's `data`, at every worker."""
        if self._rendezvous is None:
            return data
        if not self._training:
            self.check_equal({})  # A chief that fails before it has the data is heard at once here.
        size = int.from_bytes(self._add_up(len(data).to_bytes(8, "little"), 8), "little")
        return self._add_up(data, size)

    def _add_up(self, data: bytes, size: int) -> bytes:
        """The chief's `data`, which all know to have that size."""
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
        parts = [add(tf.constant(chief[i : i + BROADCAST_BYTES])).numpy() for i in starts]
        return b"".join(part.astype(np.uint8).tobytes() for part in parts)

    def begin_training(self) -> None:
        """Ends the talk that precedes training; from here on TensorFlow watches the others."""
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._training = True

    def __enter__(self) -> "DistributedContext":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self._rendezvous is None:
            return
        lost_peer = isinstance(error, LOST_WORKER_ERRORS)
        if lost_peer:
            # Before training the group knows more: the other has said why it ends.
            why = None if self._training else self._rendezvous.failure()
            why = why or describe_lost_worker(error, self.spec.cluster, self._timeout)
            error = LostWorkerError(why)
        self._rendezvous.abort(reason(error))
        if lost_peer:
            raise error from None


def describe_lost_worker(error: tf.errors.OpError, cluster: Cluster, timeout: float) -> str:
    """One line on the worker that TensorFlow's error is about."""
    others = set(range(len(cluster.addresses))) - {cluster.index}
    # At the start TensorFlow names those who came and then those who did not; later, who noticed.
    _, absent, text = error.message.rpartition("timed out task")
    tasks = {int(n) for n in re.findall(r"/task:(\d+)", text)} & others
    late = "timed out" in error.message and not absent
    if late:
        tasks = others if len(others) == 1 else set()
    elif not tasks and "CoordinationService" in error.message:
        tasks = {0}  # It is the chief's.
    names = [f"worker {i} ({cluster.addresses[i]})" for i in sorted(tasks)]
    who = " and ".join(names) or ("a worker" if late else "another worker")
    if late:
        who += f" kept the others waiting for more than --peer_timeout={timeout:g} s"
    else:
        who += " ended or cannot be reached"
    return f"{who}; nothing that was saved is lost: start all workers again to go on from there"


def _one_machine(spec: StrategySpec) -> tf.distribute.Strategy:
    if spec.name == "none":
        return tf.distribute.get_strategy()
    if spec.devices[0].startswith("CPU"):
        _split_cpu(len(spec.devices))
    return tf.distribute.MirroredStrategy(list(spec.devices))


def _multiworker(spec: StrategySpec, timeout: float) -> tf.distribute.Strategy:
    cluster = spec.cluster
    gpus = sum(device.startswith("GPU") for device in spec.devices)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )
    _limit_start(cluster, timeout)
    # Without a limit the others would wait for ever for a worker that is alive but stuck.
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout)
    before = signal.getsignal(signal.SIGTERM)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    if threading.current_thread() is threading.main_thread():
        # TensorFlow takes SIGTERM, by which launchers end a process, and goes on.
        signal.signal(signal.SIGTERM, before)
    return strategy


def _limit_start(cluster: Cluster, timeout: float) -> None:
    """Limits how long TensorFlow's servers look for each other, where that can be done.

    By itself it is an hour, in which Python is held: neither Ctrl-C nor the group is heard.
    """
    # As the strategy would, which leaves alone what is configured and has no argument for the limit.
    # This is private: a TensorFlow that has changed it goes on with its own limit.
    try:
        from tensorflow.python.eager import context

        job = context.coordination_config_pb2.CoordinatedJob(
            name="worker", num_tasks=len(cluster.addresses)
        )
        tensorflow = context.context()
        tensorflow.configure_coordination_service(
            service_type="standalone",
            service_leader="/job:worker/replica:0/task:0",
            coordinated_jobs=[job],
            cluster_register_timeout_in_ms=int(1000 * max(MEET_SECONDS, MEET_SHARE * timeout)),
        )
        tensorflow.coordination_service.cluster_register_with_barrier = True
    except (ImportError, AttributeError, TypeError):
        pass


def _split_cpu(count: int) -> None:
    """Makes `count` virtual devices of the CPU."""
    if len(tf.config.get_visible_devices("CPU")) == 0:
        raise UsageError("this process sees no CPU device")
    cpu = tf.config.get_visible_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        # TensorFlow has started. That is well where it did so with enough devices.
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError(
                f"--replicas={count} must be chosen before TensorFlow starts computing"
            ) from None
