"""A study: trials in an Optuna storage, each trained once, by one process or by several."""

import contextlib
import fcntl
import itertools
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from keras_cifar.core import places
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.options import check
from keras_cifar.core.run_directory import LOCK, Run
from keras_cifar.distributed import strategy
from keras_cifar.evaluation import plots
from keras_cifar.reporting import study as records
from keras_cifar.training import seeds, trainer
from keras_cifar.tuning import trial

# Trials before TPE proposes and the pruner judges. Optuna's default for TPE, 10, is half of 20 trials.
STARTUP = 5
BUSY_SECONDS = 60  # that SQLite waits for another process


@contextlib.contextmanager
def _reached(*errors: type[Exception]) -> Iterator[None]:
    """Makes one line of the errors of a storage, and of `errors`."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, *errors) as error:
        raise UserError(f"the storage of the study: {reason(error)}") from None


class Study:
    """The trials of a search, of which this process trains those that no other does.

    A trial waits in the storage until a process has locked its directory, so that no other process of
    the machine takes it, and has set it to RUNNING, which one machine can do. A trial that is RUNNING
    and not locked was interrupted.

    Args:
        path: the directory of the study, which may move.
        config: the flags that all trials share.
        space: the values of the searched flags.
        trials: how many there should be; a grid has no more than its points.
        storage: a URL of SQLAlchemy, where the study has the name of its directory; None is SQLite in
            `path`.
        sampler: tpe (Bergstra et al. 2011, NeurIPS), random, or grid: all alternatives in turn.
        pruner: median, hyperband (Li et al. 2018, arXiv:1603.06560) or none.
        seed: of the sampler.

    Raises:
        UsageError: a study with other flags is there, or something else.
        UserError: the storage cannot be reached.
    """

    def __init__(
        self,
        path: str,
        config: TrainConfig,
        space: dict[str, BaseDistribution],
        *,
        trials: int = 20,
        storage: str | None = None,
        sampler: str = "tpe",
        pruner: str = "median",
        seed: int = 0,
    ):
        if strategy.choose(config.devices).cluster:
            raise UsageError("a trial has a single worker; see --storage for several machines")
        self.path, self.config, self.space = pathlib.Path(path).expanduser(), config, space
        self.sampler, self.seed = sampler, seed
        # The flags of each trial, as far as they are known before it starts.
        given = _points(space)[:trials] if sampler == "grid" else [{}] * trials
        self.trials = len(given)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._trials_dir = records.trials_dir(path)
        if self.path.exists() and not self._trials_dir.is_dir():
            check(not any(self.path.iterdir()), f"--study={path} exists and is not a study")
        self._trials_dir.mkdir(parents=True, exist_ok=True)
        file = str(self.path.absolute() / "study.db")
        url = storage or sqlalchemy.URL.create("sqlite", database=file).render_as_string()
        wait = {"timeout": BUSY_SECONDS} if url.startswith("sqlite") else {}
        # Two processes cannot create the tables at once.
        with open(self._trials_dir / LOCK, "a") as lock, _reached(ImportError, LookupError):
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.storage = optuna.storages.RDBStorage(url, {"connect_args": wait})
            name = self.path.absolute().name if storage else "study"
            options = {"direction": "maximize", "pruner": _pruner(pruner, config.fit.epochs)}
            options |= {"storage": self.storage, "load_if_exists": True}
            self.study = optuna.create_study(study_name=name, **options)
            self._check_settings()
            for params in given[len(self.study.trials) :]:
                values = {"params": params, "distributions": space if params else {}}
                self.study.add_trial(create_trial(state=TrialState.WAITING, **values))

    def _check_settings(self) -> None:
        """Stores what all trials share; UsageError if the study has something else."""
        flags = self.config.flags()
        ours = {f"space: {name}": str(values) for name, values in self.space.items()}
        ours |= {"sampler": self.sampler, "seed": self.seed}
        settings = {"search": ours, "flags": flags, "paths": places.recorded(flags)}
        if "settings" not in self.study.user_attrs:
            self.study.set_user_attr("settings", settings)
        before = self.study.user_attrs["settings"]
        found = self.config.differences(before["flags"], before["paths"])
        theirs = before["search"]
        names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
        found += [f"--{n} was {theirs.get(n)}, is {ours.get(n)}" for n in names]
        message = f"{self.path} is a study with other flags: {'; '.join(found)}"
        check(not found, f"{message}; choose another --study or the same flags")

    @_reached()
    def search(self) -> None:
        """Trains trials until each is finished or in another process.

        Raises:
            UserError: no fault of the searched flags, such as images that cannot be read.
            StoppedError: a signal arrived; the trial resumes when the study does.
        """
        claimed = True
        while claimed:
            with contextlib.ExitStack() as stack:
                if claimed := self._claim(stack):
                    self._train(*claimed)

    def _claim(self, stack: contextlib.ExitStack) -> tuple[int, int, Run] | None:
        """(number, Optuna's id, run) of a trial for this process, locked in `stack`; or None."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        for seen in self.study.trials[: self.trials]:
            waits, record = seen.state is TrialState.WAITING, self._record(seen.number)
            # Without a record here it is a trial of another machine.
            if not waits and (seen.state is not TrialState.RUNNING or not record.exists()):
                continue
            run = Run(record.with_suffix(""), restart=f"--study={self.path}")
            try:
                stack.enter_context(run.locked())
            except UserError:
                continue  # Another process trains it.
            key = self.storage.get_trial_id_from_study_id_trial_number(study_id, seen.number)
            is_ours = self.storage.get_trial(key).state is seen.state
            if is_ours and waits:
                # First, so that a kill in between does not make it a trial of another machine.
                write_json(record, records.UNFINISHED)
                is_ours = self.storage.set_trial_state_values(key, TrialState.RUNNING)
                if not is_ours:
                    record.unlink()
            if is_ours:
                return seen.number, key, run
            stack.pop_all().close()
        return None

    def _train(self, number: int, key: int, run: Run) -> None:
        """Trains a trial and tells Optuna how it ended."""
        params = self.storage.get_trial(key).params
        if len(params) < len(self.space):
            params = self._propose(number)
            for name, value in params.items():
                values = self.space[name]
                self.storage.set_trial_param(key, name, values.to_internal_repr(value), values)
        text = ", ".join(f"{name} {records.short(value)}" for name, value in params.items())
        print(f"trial {number:04} of {self.trials}: {text}", flush=True)
        judge = trial.Judge(
            run,
            lambda *value: self.storage.set_trial_intermediate_value(key, *value),
            lambda: self.study.pruner.prune(self.study, self.storage.get_trial(key)),
        )
        found = trial.train(self.config, params, run, judge)
        write_json(self._record(number), found)
        self.storage.set_trial_user_attr(key, "record", found)
        # One that failed counts as pruned: the sampler, which ignores failures, is to avoid it.
        state = TrialState.COMPLETE if found["state"] == "complete" else TrialState.PRUNED
        value = found["val_accuracy"] if state is TrialState.COMPLETE else None
        # Another machine may have trained it too, if this one was killed at a bad moment.
        self.study.tell(number, value, state, skip_if_finished=True)
        print(f"trial {number:04} {records.summary(found)}\n", flush=True)

    def _propose(self, number: int) -> dict:
        """The flags of a trial: a function of the seed, its number and the other trials alone."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        sampler = optuna.samplers.RandomSampler(seed)
        if self.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
        # Of a copy in memory: a kill in the midst of a proposal would change the rest of it.
        copy = optuna.create_study(direction="maximize", sampler=sampler)
        copy.add_trials(t for t in self.study.trials if len(t.params) == len(self.space))
        return copy.ask(self.space).params

    def _record(self, number: int) -> pathlib.Path:
        """The file of a trial's record, whose name without .json is that of its run directory."""
        return self._trials_dir / f"{number:04}.json"

    @_reached()
    def results(self) -> list[dict]:
        """The records of all trials, also of other machines, the best first: see `records.ranked`."""
        trials = self.study.trials[: self.trials]
        return records.ranked({t.number: t.user_attrs.get("record", {}) for t in trials})

    def finish(self, count: int = 0) -> Iterator[tuple[str, object]]:
        """Prints the trials; writes, and with `count` seeds trains, tests and exports, the best flags.

        Yields:
            What was made, and where.

        Raises:
            UserError: no trial was trained to its end.
        """
        trials = self.results()
        best, left = trials[0], sum(found["state"] == "unfinished" for found in trials)
        print(records.table(trials), end="\n\n", flush=True)
        if left:
            print(f"{left} trials are not finished: other processes train them\n", flush=True)
        if best["state"] == "complete":
            yield from self._write(best, 0 if left else count)
        elif not left:
            raise UserError(f"no trial of {self.path} was completed: one {records.summary(best)}")

    def _write(self, best: dict, count: int) -> Iterator[tuple[str, object]]:
        config, flags = self.config.replace(**best["params"]), self.path / "best.flags"
        image = self.path / "study.png"
        yield "best", f"trial {best['number']:04}, validation accuracy {best['val_accuracy']:.4f}"
        with replacing(flags) as temporary:
            temporary.write_text(config.flagfile(), "utf-8")
        with trainer.optional(image):
            plots.save(plots.study(self.study), image)
            yield "picture", image
        if count:
            # With more trials another may be the best.
            run = Run(self.path / f"best_{best['number']:04}", restart=f"--study={self.path}")
            found = seeds.train(config.replace(seeds=count, run_dir=str(run.path)), run)
            yield "final", f"{run.path}, mean test accuracy {found['mean']:.4f} of {count} seeds"
        yield "compare", f"python -m keras_cifar.compare {self.path}"
        yield "train", f"python -m keras_cifar.train --flagfile {flags}"


def _points(space: dict[str, BaseDistribution]) -> list[dict]:
    """The flags of each point of a grid; UsageError where a flag has a range."""
    for name, values in space.items():
        is_finite = isinstance(values, CategoricalDistribution)
        check(is_finite, f"--sampler=grid needs alternatives of --{name}, separated by |, no range")
    points = itertools.product(*(values.choices for values in space.values()))
    return [dict(zip(space, point, strict=True)) for point in points]


def _pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=epochs)
    if name == "median":
        # The first quarter of a run says little about its end.
        return optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=epochs // 4)
    return optuna.pruners.NopPruner()
