"""The speed of replicas and processes on this machine, beside PyTorch's, and a model of many GPUs."""

from keras_cifar.benchmarking import scaling
from keras_cifar.benchmarking.contest import Contest, columns
from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core import environment
from keras_cifar.distributed.launcher import free_ports

ONE = "one device"
NO_EXTRAS = {"precise_bn_batches": 0}
TURNS_TIMEOUT = 3600.0  # seconds, in which a worker may wait for the others' turns
PREDICTED_GPUS = (1, 8, 64, 1024)


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints the cost of distribution here, then predicts it for many GPUs."""
    with Contest(options) as contest:
        _add_ours(contest)
        if options.peers:
            _add_pytorch(contest)
        measured = contest.take_turns()
    base = measured[ONE]["median"]
    print(f"{'images a second':<34}{'median':>10}{'low':>10}{'high':>10}{'of one':>10}")
    for name, row in measured.items():
        print(f"{name:<34}{columns(row)}{row['median'] / base:>10.2f}")
    return {"measured": measured} | _print_prediction(options)


def _add_ours(contest: Contest) -> None:
    """One device, two virtual ones and two processes, each by each way of batch normalization.

    All have as many threads in total.
    """
    options = contest.options
    group = {"norm_batch": str(options.batch_size // 2)}
    whole = {"norm_batch": "whole"}
    common = {"what": "fit", "steps": options.steps}
    contest.add(ONE, "ours", flags=NO_EXTRAS, **common)
    contest.add(f"{ONE}, groups of half", "ours", flags=NO_EXTRAS | group, **common)
    for name, flags in (("", {}), (", whole batch", whole)):
        replicas = NO_EXTRAS | flags | {"replicas": 2}
        contest.add(f"2 virtual replicas{name}", "ours", flags=replicas, **common)
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        workers = NO_EXTRAS | flags | {"workers": addresses, "peer_timeout": TURNS_TIMEOUT}
        chief, other = ({"flags": workers | {"worker_index": i}} for i in range(2))
        contest.add(f"2 processes{name}", "ours", _one_share(), [other], **chief, **common)


def _add_pytorch(contest: Contest) -> None:
    form = {"compile": False, "channels_last": True}
    contest.add("PyTorch", "pytorch", **form)
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    both = {
        "processes": 2,
        "address": address,
        "threads": int(_one_share()[environment.THREADS[0]]),
    }
    name = "PyTorch DDP, 2 processes"
    contest.add(name, "pytorch", None, [{"rank": 1}], rank=0, **form, **both)


def _one_share() -> dict[str, str]:
    """The environment variables of one of two workers' threads."""
    share = environment.shares(2)[0]
    return {name: share[name] for name in environment.THREADS}


def _print_prediction(options: BenchmarkOptions) -> dict:
    """Predicts for the network at its paper's image size; prints the model beside measurements."""
    from keras_cifar import models

    variant = models.find(options.model)
    size = variant.image_size
    model = models.build(options.model, (size, size, 3), variant.num_classes)
    found, network = scaling.traffic(model), model.deployable
    work = models.count_multiply_adds(network), len(network.layers), size * size
    print(f"\na step all-reduces {found['bytes']:,} bytes", end="; ")
    print(f"statistics of the whole batch take {found['collectives_of_whole']} collectives more")
    print(f"\nmodelled for A100s with {options.batch_size} images of {size} x {size} each")
    print(f"{'GPUs':>6}{'own statistics':>20}{'of the whole batch':>20}")
    rows = {
        gpus: scaling.predict(found, *work, options.batch_size, gpus) for gpus in PREDICTED_GPUS
    }
    for gpus, row in rows.items():
        line = f"{gpus:>6}"
        for rate in (row["replica"], row["whole"]):
            line += f"{rate:>14,.0f}{rate / gpus / rows[1]['replica']:>6.0%}"
        print(line)
    print(f"\n{'measured by others':<40}{'GPUs':>6}{'measured':>10}{'model':>8}")
    for one in scaling.PUBLISHED:
        print(f"{one.name:<40}{one.gpus:>6}{one.efficiency:>10.0%}{one.modelled():>8.0%}")
    published = {one.name: [one.efficiency, one.modelled()] for one in scaling.PUBLISHED}
    return {"traffic": found, "predicted": rows, "published": published}
