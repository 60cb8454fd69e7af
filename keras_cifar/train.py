"""Trains an image classifier, tests it once and exports a SavedModel.

python -m keras_cifar.train --model resnet32 --data cifar10 --epochs 10
"""

from keras_cifar.core import cli, environment, recipes
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run, default_run_dir


def main(config: TrainConfig) -> None:
    """Runs the command."""
    if config.output.list_recipes:
        print(recipes.table())
        return
    environment.import_tensorflow()
    if config.output.list_models:
        from keras_cifar import models

        print(models.table())
        return
    from keras_cifar.training import trainer
    from keras_cifar.training.plan import estimate

    if config.output.dry_run:
        print(estimate(config))
        if config.fit.seeds:
            print(f"seeds     {config.fit.seeds} runs like this, one after another")
        print("nothing was trained (--dry_run)")
        return
    if config.output.find_learning_rate:
        from keras_cifar.training import rate_finder

        print(rate_finder.find(config))
        return
    run = Run(config.output.run_dir or default_run_dir(config))
    if config.fit.seeds:
        train_seeds(config, run)
        return
    metrics = trainer.train(config, run)
    if metrics is None:
        print("this worker is done; worker 0 has the results")
        return
    files = {"model": run.model, "history": run.history, "curves": run.curves}
    files |= {"test": run.evaluation("test"), "confusion": run.confusion("test")}
    files |= {"logs": run.tensorboard, "report": run.report, "export": run.export}
    print(
        f"\ntest accuracy {metrics['accuracy']:.4f}, error {1 - metrics['accuracy']:.2%}, loss "
        f"{metrics['loss']:.4f} on {metrics['count']:,} images"
    )
    for name, path in files.items():
        if path.exists():
            hint = f"  (tensorboard --logdir {path})" if name == "logs" else ""
            print(f"{name:<10}{path}{hint}")
    if run.export.exists():
        print(f"\nclassify images: python -m keras_cifar.predict --model {run.path} IMAGE ...")


def train_seeds(config: TrainConfig, run: Run) -> None:
    """Trains with several seeds and prints the summary."""
    from keras_cifar.training import seeds

    summary = seeds.train(config, run)
    spread = "" if summary["std"] is None else f", standard deviation {summary['std']:.4f}"
    print(f"mean test accuracy {summary['mean']:.4f} of {config.fit.seeds} seeds{spread}")
    print(f"seeds     {run.seeds}")
    print(f"compare   python -m keras_cifar.compare {run.path} OTHER_RUN ...")


if __name__ == "__main__":
    cli.run("train", main, TrainConfig, __doc__, tensorflow=False)
