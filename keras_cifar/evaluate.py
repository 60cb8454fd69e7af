"""Evaluates a run's selected model: figures, per-class table, confusion matrix.

python -m keras_cifar.evaluate --run RUN --split test
"""

import dataclasses

from keras_cifar import cli
from keras_cifar.config import SPLITS, check, option
from keras_cifar.run import Run


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The command's flags."""

    run: str = option("", "the run directory", "Evaluation")
    split: str = option("test", "which images", "Evaluation", SPLITS)
    data: str | None = option(
        None, "other data of the same classes (default: the run's)", "Evaluation"
    )
    data_dir: str | None = option(None, "where TFDS keeps its data sets", "Evaluation")
    cache_dir: str | None = option(
        None, "where decoded images are kept (default: the run's)", "Evaluation"
    )

    def __post_init__(self):
        check(self.run, "--run=RUN is needed: the run directory")


def main(options: EvaluateOptions) -> None:
    """Runs the command."""
    from keras_cifar import evaluation, metrics

    run = Run(options.run)
    figures = evaluation.evaluate_run(
        run, options.split, options.data, options.data_dir, options.cache_dir
    )
    print(metrics.table(figures))
    print(
        f"\n{options.split} accuracy {figures['accuracy']:.4f}, top-5 {figures['top5_accuracy']:.4f}, "
        f"loss {figures['loss']:.4f} on {figures['count']:,} images"
    )
    print(f"figures   {run.evaluation(options.split)}\nconfusion {run.confusion(options.split)}")


if __name__ == "__main__":
    cli.run("evaluate", main, EvaluateOptions, __doc__)
