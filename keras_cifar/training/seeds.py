"""One configuration with several seeds: a run for each, mean and standard deviation of all."""

import statistics

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run, previous_config, with_its_rule
from keras_cifar.distributed import strategy
from keras_cifar.exporters import verification
from keras_cifar.training import trainer


def train(config: TrainConfig, run: Run) -> dict:
    """Trains `--seeds` runs one after another; finished runs are not trained again.

    All are trained in this process. Order, augmentation, dropout and initial weights are functions of
    the seed and the step, so each run has the same bits as if it were trained alone.

    The first seed is `--seed`. The runs are `seed_N` below the directory of `run`.

    Returns:
        The contents of `RUN/seeds.json`: {"seeds": {seed: test accuracy}, "mean", "std"}, the latter
        the sample standard deviation, None for one seed.
    """
    if strategy.choose(config.devices).cluster:
        raise UsageError("--seeds needs a single worker; start a run for each --seed instead")
    if run.config.exists():
        raise UsageError(
            f"--run_dir={run.path} holds a single run, not runs of --seeds; choose another"
        )
    seeds = range(config.fit.seed, config.fit.seed + config.fit.seeds)
    configs = {s: with_its_rule(config.replace(seed=s, seeds=0), run.of_seed(s)) for s in seeds}
    for seed in seeds:
        previous_config(configs[seed], run.of_seed(seed))  # checks the flags before any training
    accuracies = {}
    for number, seed in enumerate(seeds, start=1):
        print(f"seed {seed} ({number} of {len(seeds)})", flush=True)
        one = run.of_seed(seed)
        # An earlier epoch's model can have been tested and exported while the run was stopped.
        is_finished = len(one.read_history()) >= config.fit.epochs
        if is_finished and config.output.export:
            is_finished = verification.is_exported(one.model, one.export)
        metrics = one.read_metrics("test") if is_finished else None
        if metrics is None:
            metrics = trainer.train(configs[seed], one)
            trainer.free_memory()
        accuracies[str(seed)] = metrics["accuracy"]
        print(f"seed {seed}: test accuracy {metrics['accuracy']:.4f}\n", flush=True)
    values = list(accuracies.values())
    summary = {
        "seeds": accuracies,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }
    write_json(run.seeds, summary)
    return summary
