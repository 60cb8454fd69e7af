"""The strategy and cluster of each request. The tests' TensorFlow has two virtual CPU devices."""

import json
import re
import types

import pytest
import tensorflow as tf

from keras_cifar.core import environment
from keras_cifar.core.config import DevicesConfig
from keras_cifar.core.errors import LostWorkerError, UsageError, UserError
from keras_cifar.distributed import strategy
from keras_cifar.distributed.cluster import Cluster
from keras_cifar.distributed.rendezvous import PORTS
from keras_cifar.distributed.strategy import DistributedContext, StrategySpec
from tests.distributed.test_rendezvous import free_addresses, in_threads


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that the machine has so many GPUs."""
    real = tf.config.list_physical_devices

    def pretend(count):
        names = [f"GPU {i}" for i in range(count)]

        def devices(kind=None):
            return names if kind == "GPU" else real(kind)

        monkeypatch.setattr(tf.config, "list_physical_devices", devices)

    return pretend


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """No cluster of the machine that runs the tests."""
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def choose(name: str, replicas: int | None = None, **flags) -> StrategySpec:
    return strategy.choose(DevicesConfig(strategy=name, replicas=replicas, **flags))


@pytest.mark.parametrize(
    ("name", "replicas", "chosen", "count", "reason"),
    [
        ("auto", None, "none", 1, "the CPU"),
        ("auto", 1, "none", 1, "the CPU"),
        ("auto", 2, "mirrored", 2, "2 virtual CPU devices"),
        ("none", 1, "none", 1, "the CPU"),
        ("mirrored", None, "mirrored", 1, "1 virtual CPU device"),
        ("mirrored", 2, "mirrored", 2, "2 virtual CPU devices"),
    ],
)
def test_strategy_without_gpus(gpus, name, replicas, chosen, count, reason):
    gpus(0)
    spec = choose(name, replicas)
    assert (spec.name, spec.reason, spec.replicas) == (chosen, reason, count)
    strategy = DistributedContext(spec, DevicesConfig()).strategy
    assert strategy.num_replicas_in_sync == count
    assert isinstance(strategy, tf.distribute.MirroredStrategy) == (chosen == "mirrored")
    if chosen == "mirrored":
        devices = {device.rpartition("/")[2] for device in strategy.extended.worker_devices}
        assert devices == {f"device:CPU:{i}" for i in range(count)}
    assert DistributedContext(spec, DevicesConfig(), start=False).strategy.num_replicas_in_sync == 1


@pytest.mark.parametrize(
    ("count", "name", "replicas", "chosen", "reason", "devices"),
    [
        (1, "auto", None, "none", "one GPU", ("GPU:0",)),
        (2, "none", None, "none", "one GPU", ("GPU:0",)),
        (2, "auto", None, "mirrored", "2 GPUs", ("GPU:0", "GPU:1")),
        (2, "mirrored", 1, "mirrored", "1 GPU", ("GPU:0",)),
        (4, "auto", 3, "mirrored", "3 GPUs", ("GPU:0", "GPU:1", "GPU:2")),
    ],
)
def test_gpus_are_preferred(gpus, monkeypatch, count, name, replicas, chosen, reason, devices):
    gpus(count)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: devices)
    spec = choose(name, replicas)
    assert spec == StrategySpec(chosen, reason, devices)
    if chosen == "mirrored":
        assert DistributedContext(spec, DevicesConfig()).strategy == list(devices)


@pytest.mark.parametrize(
    ("count", "name", "replicas", "message"),
    [
        (0, "multiworker", None, "--strategy=multiworker found no cluster: give --workers"),
        (0, "none", 2, "--replicas=2 needs --strategy=mirrored or auto"),
        (0, "auto", 3, "--replicas=3 must be chosen before TensorFlow starts"),
        (2, "mirrored", 3, "--replicas=3 is more than this machine's 2 GPUs"),
        (1, "auto", 2, "--replicas=2 is more than this machine's 1 GPU"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(gpus, count, name, replicas, message):
    gpus(count)
    with pytest.raises(UsageError, match=f"^{message}") as error:
        DistributedContext(choose(name, replicas), DevicesConfig())
    assert "\n" not in str(error.value)


def test_a_split_cpu_separates_its_devices_before_they_exist(monkeypatch):
    calls = []
    monkeypatch.setattr(environment, "separate_devices", lambda count: calls.append(count))
    monkeypatch.setattr(
        tf.config, "set_logical_device_configuration", lambda cpu, parts: calls.append(len(parts))
    )
    strategy._split_cpu(2)
    assert calls == [2, 2]


# ---- Clusters

WORKERS = {"workers": "a:1, b:2,[::1]:3", "worker_index": 2}


def tf_config(kind: str, index: int, **cluster) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


TWO = tf_config("worker", 1, worker=["a:1", "b:2"])


def test_workers_of_the_flags_come_before_those_of_the_environment(gpus, environ):
    gpus(0)
    environ.setenv("TF_CONFIG", TWO)
    spec = choose("auto", **WORKERS)
    assert spec.cluster == Cluster(("a:1", "b:2", "[::1]:3"), 2, "--workers and --worker_index")
    assert (spec.name, spec.replicas) == ("multiworker", 3)
    assert spec.reason == "3 workers by --workers and --worker_index, this is 2, the CPU"


@pytest.mark.parametrize(
    ("value", "addresses", "index"),
    [
        (TWO, ("a:1", "b:2"), 1),
        (tf_config("worker", 1, worker=["b:2", "c:3"], chief=["a:1"]), ("a:1", "b:2", "c:3"), 2),
        (tf_config("chief", 0, worker=["b:2"], chief=["a:1"]), ("a:1", "b:2"), 0),
    ],
)
def test_cluster_of_tf_config_has_its_chief_first(gpus, environ, value, addresses, index):
    gpus(2)
    environ.setenv("TF_CONFIG", value)
    spec = choose("auto")
    assert spec.cluster == Cluster(addresses, index, "TF_CONFIG")
    assert spec.devices == ("GPU:0", "GPU:1")
    assert spec.replicas == 2 * len(addresses)
    assert choose("none").cluster is None


def slurm(environ, rank: int, node: str, local: int, job=7, count=4):
    values = {"STEP_NUM_TASKS": count, "STEP_NODELIST": "n[9-10]", "STEP_TASKS_PER_NODE": "2(x2)"}
    values |= {"PROCID": rank, "LOCALID": local, "JOB_ID": job}
    for name, value in values.items():
        environ.setenv(f"SLURM_{name}", str(value))
    environ.setenv("SLURMD_NODENAME", node)


@pytest.mark.parametrize("count", [0, 2])
def test_each_task_of_slurm_finds_an_address_of_its_own_node(gpus, environ, count):
    gpus(count)
    found, clusters = [], set()
    # Ranks in SLURM's order of nodes, which is not that of their names.
    for rank, (node, local) in enumerate([("n9", 0), ("n9", 1), ("n10", 0), ("n10", 1)]):
        slurm(environ, rank, node, local)
        cluster = choose("auto").cluster
        host, _, port = cluster.addresses[cluster.index].rpartition(":")
        assert host == node
        assert int(port) in PORTS
        assert cluster.source == "SLURM"
        found.append(cluster.index)
        clusters.add(cluster.addresses)
    assert sorted(found) == [0, 1, 2, 3]
    assert len(clusters) == 1
    slurm(environ, 0, "n9", 0, job=8)
    assert not set(choose("auto").cluster.addresses) & set(clusters.pop())
    slurm(environ, 0, "n9", 0, count=1)
    assert choose("auto").cluster is None


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        ({"workers": "a", "worker_index": 0}, "", "'a' is not of the form host:port"),
        ({"workers": "a:0,b:1", "worker_index": 0}, "", "'a:0' is not of the form host:port"),
        ({"workers": "a:1,a:1", "worker_index": 0}, "", "two workers have the same address"),
        ({"workers": "a:1,b:1", "worker_index": 2}, "", "worker 2 is not among the 2 workers"),
        (WORKERS | {"replicas": 2}, "", "--replicas is for one machine"),
        (WORKERS | {"strategy": "mirrored"}, "", "--workers needs --strategy=multiworker"),
        ({}, "{", "TF_CONFIG is malformed"),
        ({}, "[1]", "TF_CONFIG is malformed"),
        ({}, tf_config("worker", 0, worker=["a:1"], ps=["b:1"]), "TF_CONFIG has the job 'ps'"),
        ({}, tf_config("evaluator", 0, worker=["a:1"]), "TF_CONFIG has the job 'evaluator'"),
        ({}, tf_config("worker", 2, worker=["a:1", "b:1"]), "the task worker 2 is not in its"),
    ],
)
def test_malformed_clusters_are_refused_in_one_line(gpus, environ, flags, text, message):
    gpus(0)
    environ.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match=message) as error:
        choose(flags.pop("strategy", "auto"), **flags)
    assert "\n" not in str(error.value)


# ---- Different and lost workers


def start_workers(monkeypatch, *facts: dict, then=lambda context: None) -> list[str]:
    """Starts a worker with each of the facts, without TensorFlow's servers; their errors."""
    monkeypatch.setattr(
        strategy, "_multiworker", lambda *_: tf.distribute.OneDeviceStrategy("CPU:0")
    )
    addresses = free_addresses(len(facts))

    def start(index):
        config = DevicesConfig(workers=",".join(addresses), worker_index=index)
        with DistributedContext(strategy.choose(config), config, facts[index]) as context:
            then(context)
            context.check_equal({})

    errors = in_threads(*(lambda i=i: start(i) for i in range(len(facts))))
    return [re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", str(error)) for error in errors]


def test_workers_that_differ_are_named(monkeypatch):
    mine, other = {"--epochs": 1, "keras": "3.0"}, {"--epochs": 2, "keras": "3.0"}
    assert start_workers(monkeypatch, mine, mine) == ["None", "None"]
    line = "worker 1 (ADDRESS) differs: --epochs is 2 there and 1 at worker 0"
    assert start_workers(monkeypatch, mine, other, mine) == [line] * 3


def test_the_reason_of_a_worker_that_fails_is_shown_by_all(monkeypatch):
    def fail(context):
        if not context.is_chief:
            raise UserError("no space left")

    found = start_workers(monkeypatch, {}, {}, then=fail)
    assert found == ["worker 1 (ADDRESS) ended: no space left", "no space left"]


def test_the_time_that_tensorflows_servers_look_for_each_other_is_limited(monkeypatch):
    from tensorflow.python.eager import context

    monkeypatch.setattr(context, "_context", context.Context())
    cluster = Cluster(("a:1", "b:1", "c:1"), 1, "")
    for timeout, seconds in ((45.0, 33.75), (1.0, 30.0)):
        strategy._limit_start(cluster, timeout)
        found = context.context().coordination_service
        assert found.cluster_register_timeout_in_ms == 1000 * seconds
        assert found.cluster_register_with_barrier
        assert [job.num_tasks for job in found.coordinated_job_list] == [3]


ABSENT = """Barrier timed out. Id: [Init]Wait_for_all_tasks_to_register::0. This usually ...
The first task at the barrier: /job:worker/replica:0/task:0. Some timed out task names:
/job:worker/replica:0/task:2
"""
# As workers other than the chief receive it.
ABSENT += f"""
Additional GRPC error information from remote target /job:worker/replica:0/task:0 while calling ...:
:UNKNOWN:Error received from peer  {{grpc_message:"{ABSENT}", grpc_status:4}}"""
GONE = "ended or cannot be reached;"
LATE = "kept the others waiting for more than --peer_timeout=45 s;"


@pytest.mark.parametrize(
    ("count", "message", "line"),
    [
        (3, "From /job:worker/replica:0/task:2: Connection refused", f"worker 2 (c:1) {GONE}"),
        (3, "lost /task:1, says /task:2 and /task:0", f"worker 0 (a:1) and worker 2 (c:1) {GONE}"),
        (3, "the CoordinationService is unavailable", f"worker 0 (a:1) {GONE}"),
        (3, "Socket closed", f"another worker {GONE}"),
        (3, "Collective has timed out, says /task:0", f"a worker {LATE}"),
        (2, "Collective has timed out", f"worker 0 (a:1) {LATE}"),
        (3, ABSENT, f"worker 2 (c:1) {GONE}"),
    ],
)
def test_a_lost_worker_is_named_if_it_is_known(count, message, line):
    cluster = Cluster(("a:1", "b:1", "c:1")[:count], 1, "")
    error = tf.errors.DeadlineExceededError(None, None, message)
    found = strategy.describe_lost_worker(error, cluster, 45.0)
    assert found.startswith(line)
    assert "\n" not in found


OWN = "cuDNN launch failure : input shape ([128,16,32,32])"
GRAPH = f"""Graph execution error:

Detected at node stage0_conv/convolution defined at (most recent call last):
<stack traces unavailable>
{OWN}
\t [[{{{{node stage0_conv/convolution}}}}]] [Op:__inference_train_steps_1]"""


@pytest.mark.parametrize("kind", strategy.AMBIGUOUS_ERRORS)
@pytest.mark.parametrize(
    ("message", "own"),
    [
        (OWN, True),
        (GRAPH, True),
        (f"{OWN} on /job:worker/replica:0/task:1/device:GPU:0", True),
        ("[_Derived_]RecvAsync is cancelled.", False),
        ("Collective ops is aborted by: the other step ended", False),
        ("From /job:worker/replica:0/task:0: the session was reset", False),
        ("Failed to connect to remote coordination service", False),
    ],
)
def test_a_workers_own_failure_is_not_taken_for_anothers(monkeypatch, kind, message, own):
    told, error = [], kind(None, None, message)
    context = DistributedContext(StrategySpec("none", "", ("CPU:0",)), DevicesConfig())
    spec = StrategySpec("multiworker", "", ("CPU:0",), Cluster(("a:1", "b:1"), 1, ""))
    context.spec, context._training = spec, True
    context._rendezvous = types.SimpleNamespace(abort=told.append)
    with pytest.raises(LostWorkerError) as caught, context:
        raise error
    assert caught.value.__cause__ is error
    line = str(caught.value)
    assert told == [line]
    if own:
        why = OWN if message == GRAPH else message
        assert line == f"worker 1 (b:1) itself failed: {why}; nothing that was saved is lost"
    else:
        assert line.startswith(
            f"{'worker 0 (a:1)' if 'task:0' in message else 'another worker'} {GONE}"
        )
        assert message in line  # It may have another cause after all.


@pytest.mark.parametrize("kind", strategy.LOST_WORKER_ERRORS)
def test_a_lost_connection_is_anothers_failure(kind):
    assert not strategy.is_own_failure(kind(None, None, OWN), Cluster(("a:1", "b:1"), 1, ""))
