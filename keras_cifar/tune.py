"""Searches for flags of training with the highest validation accuracy, with Optuna.

python -m keras_cifar.tune --study DIR --space 'learning_rate=log(1e-4,1e-1); optimizer=adam|sgd;
augment=crop(4)|flip or crop(4)|flip|cutout(8)' -- --data cifar10 --epochs 10

What follows -- are flags of keras_cifar.train, which all trials share. --space gives others a range,
log, uniform or int, or alternatives. The same command goes on where it was stopped, and several
processes with the same --study share its trials.
"""

import dataclasses

from keras_cifar.core import cli
from keras_cifar.core.config import DEFAULTS, TrainConfig
from keras_cifar.core.errors import needing
from keras_cifar.core.options import NOT_NEGATIVE, POSITIVE, SEED, Options, check, option

# Flags of train that belong to one run.
SINGLE = ("run_dir", "seeds", "dry_run", "find_learning_rate", "list_models", "list_recipes")
SINGLE += ("workers", "worker_index")


@dataclasses.dataclass(frozen=True)
class TuneOptions(Options):
    """The command's flags."""

    study: str = option("", "the directory of the trials and the results", "Search")
    space: str = option("", "the flags to search, separated by ;", "Search")
    trials: int = option(20, "in all, with those of earlier starts", "Search", limit=POSITIVE)
    sampler: str = option("tpe", "what proposes flags", "Search", ("tpe", "random", "grid"))
    pruner: str = option(
        "median", "what stops hopeless trials early", "Search", ("median", "hyperband", "none")
    )
    seed: int = option(0, "of the sampler", "Search", limit=SEED)
    storage: str | None = option(
        None,
        "URL of a database for several machines, such as postgresql://USER@HOST/NAME "
        "(default: SQLite in --study)",
        "Search",
    )
    final_seeds: int = option(
        0,
        "at the end train, test and export the best flags with so many seeds",
        "Search",
        limit=NOT_NEGATIVE,
    )


def main(options: TuneOptions, train_flags: list[str]) -> None:
    """Runs the command."""
    check(bool(options.study), "--study=DIR is missing: where the trials and the results are")
    config, rest = cli.parse(TrainConfig, train_flags)
    check(not rest, f"unexpected argument {''.join(rest[:1])!r}; flags of train follow --")
    for name in SINGLE:
        check(config.flags()[name] == DEFAULTS[name], f"--{name} cannot be used in a search")
    with needing("tune", "tune"):
        from keras_cifar.tuning import space, study
    values = dataclasses.asdict(options)
    path, seeds = values.pop("study"), values.pop("final_seeds")
    values["space"] = space.parse(options.space, train_flags)
    search = study.Study(path, config, **values)
    search.search()
    for what, where in search.finish(seeds):
        print(f"{what:<10}{where}", flush=True)


if __name__ == "__main__":
    cli.run("tune", main, TuneOptions, __doc__, "-- TRAIN_FLAGS")
