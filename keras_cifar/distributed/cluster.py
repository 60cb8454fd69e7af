"""The workers of a run: from --workers, TF_CONFIG or SLURM."""

import dataclasses
import json
import os
from collections.abc import Mapping

import tensorflow as tf

from keras_cifar.core.config import DevicesConfig
from keras_cifar.core.errors import UsageError, reason
from keras_cifar.distributed.rendezvous import PORTS, split_address


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
                split_address(address)
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


def find_cluster(config: DevicesConfig, environ: Mapping[str, str] = os.environ) -> Cluster | None:
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
