"""Finds the workers of a run: in --workers, TF_CONFIG or SLURM's environment."""

import dataclasses
import json
import os
from collections.abc import Mapping

import tensorflow as tf

from keras_cifar.core.config import DevicesConfig
from keras_cifar.core.errors import UsageError, reason
from keras_cifar.core.options import check
from keras_cifar.distributed.rendezvous import PORTS, parse_address


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run; the first of them is the chief, the only one that writes."""

    addresses: tuple[str, ...]  # "host:port" of each
    index: int  # of this process among them
    source: str  # where the addresses come from, for messages

    def __post_init__(self):
        count = len(self.addresses)
        for address in self.addresses:
            parse_address(address, f"{self.source}: ")
        check(
            len(set(self.addresses)) == count, f"{self.source}: two workers have the same address"
        )
        check(
            0 <= self.index < count,
            f"{self.source}: worker {self.index} is not among the {count} workers 0, 1, ...",
        )

    def name(self, worker: int) -> str:
        """What messages call a worker: its index and address."""
        return f"worker {worker} ({self.addresses[worker]})"


def find_cluster(config: DevicesConfig, environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Returns the cluster of --workers, else of TF_CONFIG, else of SLURM, else None.

    Raises:
        UsageError: it is malformed, or has parameter servers.
    """
    if config.workers is not None:
        addresses = tuple(address.strip() for address in config.workers.split(","))
        index = config.worker_index
        assert index is not None  # DevicesConfig checks it
        return Cluster(addresses, index, "--workers and --worker_index")
    if environ.get("TF_CONFIG", "").strip():
        return _from_tf_config(environ["TF_CONFIG"])
    try:
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return _from_slurm(environ)
    except Exception as error:  # TensorFlow's resolver raises half a dozen classes.
        raise UsageError(f"SLURM's environment cannot be read: {reason(error)}") from None
    return None


def _from_tf_config(text: str) -> Cluster | None:
    try:
        value = json.loads(text)
        jobs = {name: list(hosts) for name, hosts in value.get("cluster", {}).items() if hosts}
        task = value.get("task", {})
        kind, index = str(task.get("type", "worker")), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"TF_CONFIG is malformed: {reason(error)}") from None
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


def _from_slurm(environ: Mapping[str, str]) -> Cluster:
    job = int(environ.get("SLURM_JOB_ID", "0"))
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    # Each job gets its own ports, as two jobs may share a machine.
    slots = max(1, len(PORTS) // tasks)
    port = PORTS[job % slots * tasks]
    # The resolver derives the tasks of a node from its GPUs: with one for each task it finds all.
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=port, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().as_dict()["worker"]
    # The resolver sorts the hosts by name, SLURM does not: this rank's address may be elsewhere.
    own = f"{environ.get('SLURMD_NODENAME')}:{port + int(environ.get('SLURM_LOCALID', '0'))}"
    index = addresses.index(own) if own in addresses else resolver.task_id
    return Cluster(tuple(addresses), index, "SLURM")
