"""Evaluates a run's selected model: metrics, a table of the classes, the confusion matrix.

python -m keras_cifar.evaluate --run RUN --split test
python -m keras_cifar.evaluate --run RUN --disturb
"""

import dataclasses

from keras_cifar.core import cli
from keras_cifar.core.config import SPLITS
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import Run


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
    disturb: bool = option(
        False,
        "evaluate under disturbances instead: rotation, blur, occlusion ..., each at five strengths; "
        "takes 60 times as long",
        "Disturbances",
    )
    disturb_seed: int = option(0, "of everything random in the disturbances", "Disturbances")
    max_images: int | None = option(
        None,
        "with --disturb: this many images, spread over the split (default: all)",
        "Disturbances",
    )

    def __post_init__(self):
        check(self.run, "--run=RUN is needed: the run directory")
        check(self.disturb_seed >= 0, f"--disturb_seed={self.disturb_seed} must be 0 or more")
        if self.max_images is not None:
            check(self.disturb, "--max_images needs --disturb")
            check(self.max_images > 0, f"--max_images={self.max_images} must be 1 or more")


def main(options: EvaluateOptions) -> None:
    from keras_cifar.evaluation import evaluator, robustness, text

    run, split = Run(options.run), options.split
    source = evaluator.DataSource(options.data, options.data_dir, options.cache_dir)
    if options.disturb:
        record = robustness.disturb(run, split, source, options.disturb_seed, options.max_images)
        print(f"{text.disturbance_table(record)}\n\n{split} {text.disturbance_summary(record)}")
        files = split, run.other_data(record)
        print(f"metrics     {run.disturbances(*files)}\nimages      {run.gallery(*files)}")
        return
    metrics = evaluator.evaluate_run(run, split, source)
    print(f"{text.metrics_table(metrics)}\n\n{split} {text.metrics_summary(metrics)}")
    if "min_probability" in metrics:
        print(f"unknown     {text.threshold_summary(metrics['min_probability'])}")
    files = split, run.other_data(metrics)
    print(f"metrics     {run.evaluation(*files)}\npredictions {run.predictions(*files)}")
    print(f"confusion   {run.confusion(*files)}")


if __name__ == "__main__":
    cli.run("evaluate", main, EvaluateOptions, __doc__)
