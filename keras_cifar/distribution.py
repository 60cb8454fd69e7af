"""Where a run computes: one device, replicas on several, or workers on several machines."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from keras_cifar.config import TrainConfig
from keras_cifar.errors import LostWorkerError, UsageError, UserError, reason
from keras_cifar.group import PORTS, Group, split

# Bytes of one broadcast: large enough to be fast, small enough for --peer_timeout.
BROADCAST_BYTES = 2**22

# How long TensorFlow's servers may look for each other: a share of --peer_timeout, and at least. They
# have just met, and what ends is noticed and said up to 12 s later.
MEET_SHARE, MEET_SECONDS = 0.75, 30.0

# How TensorFlow reports that another worker is gone, stuck or restarted.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
)


@dataclasses.dataclass(frozen=True)
class Share:
    """The replicas that one process feeds: `count` from `first` on, of `total` in all processes."""

    first: int = 0
    count: int = 1
    total: int = 1

    @classmethod
    def of(cls, context: tf.distribute.InputContext) -> "Share":
        """That of the process for which `strategy.distribute_datasets_from_function` asks."""
        count = context.num_replicas_in_sync // context.num_input_pipelines
        return cls(context.input_pipeline_id * count, count, context.num_replicas_in_sync)


def bounds(examples: int, replicas: int) -> list[int]:
    """Where the parts of each replica begin and end, as equal as can be: replicas + 1 positions."""
    return [examples * replica // replicas for replica in range(replicas + 1)]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Batches that are cut into the replicas' pieces; iterate over these, not over the data set.

    Attributes:
        dataset: yields (images, labels) for each replica of this process; endless where `steps` is
            given.
        steps: batches in a pass; None is until it ends.
    """

    dataset: tf.data.Dataset | tf.distribute.DistributedDataset
    steps: int | None

    def __iter__(self) -> Iterator:
        iterator = iter(self.dataset)
        _stop_reading_first(iterator)
        return iterator


def _stop_reading_first(iterator: Iterator) -> None:
    """Has the thread that reads ahead for replicas end before what it reads is freed.

    TensorFlow frees the data set first where no optimization has rewritten it, as `pipeline` has it:
    a thread that was just then computing a batch reads freed memory, and the process dies (SIGSEGV).
    To be initialized again, with no data, is the one way to end the thread by itself.
    """
    # This is private. Where TensorFlow has changed it the reading goes on as ever, and a test says so.
    try:
        for worker in getattr(iterator, "_iterators", ()):
            reader = worker._iterator._multi_device_iterator_resource
            # Called when Python is about to free the iterator, and still has it.
            weakref.finalize(worker, _stop_reading, reader, worker._dataset.take(0))
    except AttributeError:
        pass


def _stop_reading(reader: tf.Tensor, nothing: tf.data.Dataset) -> None:
    # Python may be anywhere when it frees the iterator: tracing a function, on another device.
    with contextlib.suppress(tf.errors.OpError), tf.init_scope(), tf.device(reader.device):
        tf.raw_ops.MultiDeviceIteratorInit(
            dataset=tf.data.experimental.to_variant(nothing),
            multi_device_iterator=reader,
            max_buffer_size=1,
        )


def pieces(
    strategy: tf.distribute.Strategy, make: Callable[[Share], tf.data.Dataset], steps: int | None
) -> Pieces:
    """The pieces that `make` yields one after another for the replicas of a share."""
    dataset = strategy.distribute_datasets_from_function(lambda context: make(Share.of(context)))
    return Pieces(dataset, steps)


def cut(
    strategy: tf.distribute.Strategy,
    dataset: tf.data.Dataset,
    steps: int | None,
    parts: int | None,
) -> Pieces:
    """Cuts whole batches (images [B, ...], labels [B, K]) for the replicas.

    Args:
        steps: batches in a pass; None is as many as the data set has.
        parts: in training, of a batch, one after another. Fewer examples than parts, or in a part
            than replicas, go whole into each, with labels of so much less weight. None is for
            evaluation: there a batch is filled with examples whose label is all zero.

    Raises:
        ValueError: there are no batches, or nobody knows how many.
    """
    known = int(dataset.cardinality())
    if known == 0:
        raise ValueError("the data set is empty")
    if steps is None and known > 0:
        steps = known
    if steps is None and known == tf.data.INFINITE_CARDINALITY:
        raise ValueError("the data set is endless: give the number of steps")
    if steps is None and strategy.num_replicas_in_sync > 1:
        raise ValueError("the data set does not know its length: give the number of steps")
    if steps is not None:
        dataset = dataset.repeat()

    def make(share: Share) -> tf.data.Dataset:
        if share.total * (parts or 1) == 1:
            return dataset
        number = share.total * (parts or 1)
        replicas = range(share.first, share.first + share.count)
        mine = [part * share.total + r for part in range(parts or 1) for r in replicas]

        def pieces_of(images, labels):
            size = tf.shape(labels)[0]
            if parts is None:
                missing = tf.maximum(number - size, 0)
                images, labels = (
                    tf.pad(x, [[0, missing], *[[0, 0]] * (x.shape.rank - 1)])
                    for x in (images, labels)
                )
                size += missing

            def piece(index):
                part = _nth(index // share.total, parts or 1, images, labels)
                return _nth(index % share.total, share.total, *part)

            indices = tf.data.Dataset.from_tensor_slices(tf.constant(mine))
            return indices.map(piece)

        return endless(dataset.flat_map(pieces_of).prefetch(tf.data.AUTOTUNE))

    return pieces(strategy, make, steps)


def _nth(index, number: int, images, labels) -> tuple:
    """One of so many equal shares of examples; all of them where they are fewer, for their share."""
    size = tf.shape(labels)[0]
    whole = size < number
    start, end = size * index // number, size * (index + 1) // number
    start, end = tf.where(whole, 0, start), tf.where(whole, size, end)
    # Each of them then counts once in all.
    weight = tf.cast(tf.where(whole, 1 / number, 1.0), labels.dtype)
    return images[start:end], labels[start:end] * weight


def endless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set, which says that it has no end.

    Where tf.distribute does not know that, it asks all replicas in each step whether they have data
    left, and hides the static shapes.
    """
    return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        addresses: host:port of each; the first is the chief, which alone writes.
        index: of this process among them.
        source: who named them, for messages.
    """

    addresses: tuple[str, ...]
    index: int
    source: str

    def __post_init__(self):
        for address in self.addresses:
            try:
                split(address)
            except UsageError:
                raise UsageError(
                    f"{self.source}: {address!r} is not of the form host:port"
                ) from None
        if len(set(self.addresses)) < len(self.addresses):
            raise UsageError(f"{self.source}: two workers have the same address")
        if not 0 <= self.index < len(self.addresses):
            raise UsageError(
                f"{self.source}: worker {self.index} is not among the {len(self.addresses)} workers "
                "0, 1, ..."
            )


def find_cluster(config: TrainConfig, environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster of --workers, else of TF_CONFIG, else of SLURM; None where there is none.

    Raises:
        UsageError: it is not well formed, or has parameter servers.
    """
    if config.workers is not None:
        addresses = tuple(part.strip() for part in config.workers.split(","))
        return Cluster(addresses, config.worker_index, "--workers and --worker_index")
    if environ.get("TF_CONFIG", "").strip():
        return _of_tf_config(environ["TF_CONFIG"])
    try:
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return _of_slurm(environ)
    except Exception as error:  # TensorFlow's resolver raises half a dozen classes.
        raise UsageError(f"SLURM's environment cannot be read: {reason(error)}") from None
    return None


def _of_tf_config(text: str) -> Cluster | None:
    try:
        value = json.loads(text)
        jobs = {name: list(hosts) for name, hosts in value.get("cluster", {}).items() if hosts}
        task = value.get("task", {})
        kind, index = str(task.get("type", "worker")), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"TF_CONFIG is not as TensorFlow defines it: {reason(error)}") from None
    if not jobs:
        return None
    for name in {*jobs, kind} - {"chief", "master", "worker"}:
        raise UsageError(
            f"TF_CONFIG has the job {name!r}: parameter servers and evaluators are not supported by "
            "Keras 3; give each machine a worker"
        )
    names = [name for name in ("chief", "master", "worker") if name in jobs]
    addresses = [address for name in names for address in jobs[name]]
    if kind not in names or not 0 <= index < len(jobs[kind]):
        raise UsageError(f"TF_CONFIG: the task {kind} {index} is not in its cluster")
    before = sum(len(jobs[name]) for name in names[: names.index(kind)])
    return Cluster(tuple(map(str, addresses)), before + index, "TF_CONFIG")


def _of_slurm(environ: Mapping[str, str]) -> Cluster:
    job = int(environ.get("SLURM_JOB_ID", "0"))
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    # Others for each job, as two may share a machine.
    steps = max(1, len(PORTS) // tasks)
    port = PORTS[job % steps * tasks]
    # The resolver counts GPUs to find tasks; as many as there are tasks gives all their ports.
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=port, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().as_dict()["worker"]
    # The resolver sorts the hosts by name and SLURM does not, so a rank may be another's address.
    own = f"{environ.get('SLURMD_NODENAME')}:{port + int(environ.get('SLURM_LOCALID', '0'))}"
    index = addresses.index(own) if own in addresses else resolver.task_id
    return Cluster(tuple(addresses), index, "SLURM")


@dataclasses.dataclass(frozen=True)
class Choice:
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


def choose(config: TrainConfig) -> Choice:
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
        return Choice("multiworker", why, devices, cluster)
    wanted = replicas or max(gpus, 1)
    if name == "auto":
        name = "mirrored" if wanted > 1 else "none"
    if name == "none":
        if (replicas or 1) > 1:
            raise UsageError(f"--replicas={replicas} needs --strategy=mirrored or auto")
        return Choice("none", "one GPU" if gpus else "the CPU", ("GPU:0" if gpus else "CPU:0",))
    if gpus and wanted > gpus:
        raise UsageError(f"--replicas={wanted} is more than this machine's {gpus} GPUs")
    kind = "GPU" if gpus else "virtual CPU device"
    devices = tuple(f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(wanted))
    return Choice("mirrored", f"{wanted} {kind}{'s' if wanted > 1 else ''}", devices)


class Devices:
    """A choice that was started; a context that ends the other workers when this one fails.

    Attributes:
        choice: what was chosen.
        strategy: TensorFlow's.
    """

    def __init__(
        self,
        choice: Choice,
        config: TrainConfig,
        facts: Mapping | None = None,
        start: bool = True,
    ):
        """Starts the choice; call it before TensorFlow computes anything.

        Args:
            facts: what all workers must have in common, by name; JSON.
            start: False joins nobody and has the strategy of one device, to look at a plan.

        Raises:
            UsageError, UserError: another worker is missing or differs, or a port is taken.
        """
        self.choice, self._timeout = choice, config.peer_timeout
        cluster = choice.cluster
        self._group, self._met = None, False
        if not start:
            self.strategy = tf.distribute.get_strategy()
            return
        if cluster is None:
            self.strategy = _one_machine(choice)
            return
        self._group = Group(
            cluster.addresses, cluster.index, config.startup_timeout, config.peer_timeout
        )
        with self:
            self.agree(facts or {})
            self.strategy = _multiworker(choice, config.peer_timeout)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes."""
        return self.choice.cluster is None or self.choice.cluster.index == 0

    def agree(self, facts: Mapping) -> None:
        """Waits for all workers and compares; each gives the same names.

        Raises:
            UserError: a value differs from the chief's.
        """
        if self._group is None:
            return
        everyone = self._group.gather(dict(facts))
        for index, theirs in enumerate(everyone):
            differences = [
                f"{name} is {theirs.get(name)!r} there and {value!r} at worker 0"
                for name, value in everyone[0].items()
                if theirs.get(name) != value
            ]
            if differences:
                raise UserError(
                    f"worker {index} ({self.choice.cluster.addresses[index]}) differs: "
                    f"{'; '.join(differences)}"
                )

    def broadcast(self, data: bytes) -> bytes:
        """The chief's `data`, at every worker."""
        if self._group is None:
            return data
        if not self._met:
            self.agree({})  # A chief that fails before it has the data is heard at once here.
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

    def meet(self) -> None:
        """Ends the talk that precedes training; from here on TensorFlow watches the others."""
        if self._group is not None:
            self._group.close()
            self._met = True

    def __enter__(self) -> "Devices":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self._group is None:
            return
        lost_peer = isinstance(error, LOST)
        if lost_peer:
            # Before training the group knows more: the other has said why it ends.
            why = None if self._met else self._group.failure()
            error = LostWorkerError(why or lost(error, self.choice.cluster, self._timeout))
        self._group.abort(reason(error))
        if lost_peer:
            raise error from None


def lost(error: tf.errors.OpError, cluster: Cluster, timeout: float) -> str:
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


def _one_machine(choice: Choice) -> tf.distribute.Strategy:
    if choice.name == "none":
        return tf.distribute.get_strategy()
    if choice.devices[0].startswith("CPU"):
        _split_cpu(len(choice.devices))
    return tf.distribute.MirroredStrategy(list(choice.devices))


def _multiworker(choice: Choice, timeout: float) -> tf.distribute.Strategy:
    cluster = choice.cluster
    gpus = sum(device.startswith("GPU") for device in choice.devices)
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
