"""One trial: an ordinary run without test and export, whose epochs Optuna judges."""

from collections.abc import Callable

import keras

from keras_cifar.core.cli import OUT_OF_MEMORY
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError, is_out_of_memory
from keras_cifar.core.run_directory import Run
from keras_cifar.training import trainer
from keras_cifar.training.recorder import DivergedError, best_epoch


class Judge(keras.callbacks.Callback):
    """Calls `report(epoch, accuracy)` for each epoch, and stops training if `is_hopeless()`.

    After a kill epochs are reported again, and the last one may be judged for the first time.
    """

    def __init__(self, run: Run, report: Callable, is_hopeless: Callable):
        super().__init__()
        self.run, self.report, self.is_hopeless, self.has_stopped = run, report, is_hopeless, False

    def on_train_begin(self, logs=None):
        self.on_epoch_end(0)

    def on_epoch_end(self, epoch, logs=None):
        history = self.run.read_history()
        for row in history:
            if "val_accuracy" not in row:
                raise UserError("a search needs validation images: --val_fraction must be above 0")
            self.report(int(row["epoch"]), row["val_accuracy"])
        # After the last epoch there is nothing to save.
        if history and not self.model.stop_training and self.is_hopeless():
            self.model.stop_training = self.has_stopped = True


def train(config: TrainConfig, params: dict, run: Run, judge: Judge) -> dict:
    """Trains with `params` in place of flags of `config`; returns a record: see `reporting.study`.

    Raises:
        UserError: no fault of `params`, such as images that cannot be read.
        StoppedError: a signal arrived.
    """
    state, why = "complete", ""
    try:
        with trainer.trained(config.replace(**params, run_dir=str(run.path)), run, (judge,)):
            state = "pruned" if judge.has_stopped else state
    except (DivergedError, UsageError) as error:
        state, why = "failed", str(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        state, why = "failed", OUT_OF_MEMORY
    trainer.free_memory()
    history = run.read_history()
    accuracy = history[best_epoch(history) - 1]["val_accuracy"] if history else None
    found = {"state": state, "val_accuracy": accuracy, "epochs": len(history), "error": why}
    return found | {"seconds": sum(row["seconds"] for row in history), "params": params}
