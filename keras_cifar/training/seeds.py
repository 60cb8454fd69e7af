"""One configuration with several seeds: a run for each, mean and standard deviation of all."""

import gc
import statistics

import keras

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.core.files import versions, write_json
from keras_cifar.core.run_directory import Run, previous_config
from keras_cifar.distributed import strategy
from keras_cifar.training import trainer


def train(config: TrainConfig, run: Run) -> dict:
    """Trains `--seeds` runs one after another; finished runs are not trained again.

    All are trained in this process. Order, augmentation, dropout and initial weights are functions of
    the seed and the step, so each run has the same bits as if it were trained alone.

    Args:
        config: its `seed` is the first seed.
        run: the runs are `seed_N` below its directory.

    Returns:
        The contents of `RUN/seeds.json`: {"seeds": {seed: test accuracy}, "mean", "std"}, the latter
        the sample standard deviation, None for one seed.

    Raises:
        UsageError, UserError, StoppedError: as `trainer.train`. The flags of all seeds are checked
            before the first is trained.
    """
    if strategy.choose(config.devices).cluster:
        raise UsageError("--seeds needs a single worker; start a run for each --seed instead")
    if run.config.exists():
        raise UsageError(
            f"--run_dir={run.path} holds a single run, not runs of --seeds; choose another"
        )
    seeds = range(config.fit.seed, config.fit.seed + config.fit.seeds)
    configs = {seed: config.replace(seed=seed, seeds=0) for seed in seeds}
    for seed in seeds:
        previous_config(configs[seed], run.of_seed(seed))
    accuracies = {}
    for number, seed in enumerate(seeds, start=1):
        print(f"seed {seed} ({number} of {len(seeds)})", flush=True)
        one = run.of_seed(seed)
        metrics = _test_metrics(one, configs[seed])
        if metrics is None:
            metrics = trainer.train(configs[seed], one)
            # A model and its functions refer to each other: only a collection frees them.
            keras.utils.clear_session()
            gc.collect()
        accuracies[seed] = metrics["accuracy"]
        print(f"seed {seed}: test accuracy {accuracies[seed]:.4f}\n", flush=True)
    values = list(accuracies.values())
    summary = {
        "seeds": {str(seed): value for seed, value in accuracies.items()},
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }
    write_json(run.seeds, summary)
    return summary


def _test_metrics(run: Run, config: TrainConfig) -> dict | None:
    """The test metrics of a finished run; None for an unfinished one."""
    if config.output.export and not versions(run.export):
        return None
    return run.read_metrics("test", config.data.data)
