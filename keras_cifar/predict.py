"""Classifies images with an exported model; needs only the SavedModel, or its server.

python -m keras_cifar.predict --model RUN dog.png holiday/ 'more/*.jpg'

RUN may be an export, pretrained:NAME, imagenet:NETWORK, or the URL of a server (http, grpc).
"""

import dataclasses
import os
import sys

from keras_cifar import pretrained
from keras_cifar.core import cli, config, environment
from keras_cifar.core.options import FRACTION, POSITIVE, Options, check, option

PREDICTION, WITH_URL = "Prediction", "With a URL"


@dataclasses.dataclass(frozen=True)
class PredictOptions(Options):
    """The command's flags."""

    model: str = option("", "a run, export, URL, pretrained:NAME or imagenet:NETWORK", PREDICTION)
    list_pretrained: bool = option(False, "print the cards of pretrained models", PREDICTION)
    top_k: int = option(3, "classes to name for each image", PREDICTION, limit=POSITIVE)
    min_probability: float = option(0.0, "below it, answer 'unknown'", PREDICTION, limit=FRACTION)
    format: str = option("text", "of what goes to stdout", PREDICTION, ("text", "csv", "json"))
    features: str | None = option(None, "also write feature vectors to this .npz file", PREDICTION)
    explain: str | None = option(
        None, "also write Grad-CAM overlays into this folder; not of an export or URL", PREDICTION
    )
    dtype_policy: str = option("float32", "auto: bfloat16 if faster", PREDICTION, config.PRECISIONS)
    timeout: float = option(60.0, "seconds that a server has for a batch", WITH_URL, limit=POSITIVE)
    labels: str | None = option(None, "a file, a class name a line, if a server has none", WITH_URL)

    def __post_init__(self):
        super().__post_init__()
        check(self.model or self.list_pretrained, "--model=RUN_or_EXPORT_or_URL is needed")
        remote = self.model.startswith(config.URLS)
        check(not (self.explain and remote), "--explain needs a run; a server gives no gradients")


def main(options: PredictOptions, arguments: list[str]) -> int:
    """Runs the command; returns 1 where a file could not be classified."""
    if options.list_pretrained:
        print(pretrained.describe())
        return 0
    check(arguments, "name at least one image, folder or glob")
    environment.import_tensorflow()
    from keras_cifar.inference import predictions
    from keras_cifar.pretrained.predictor import load_network, load_predictor

    where = options.timeout, options.labels, options.dtype_policy
    predictor, overlays = load_predictor(options.model, *where), None
    if options.explain:
        from keras_cifar.evaluation.overlays import OverlayWriter

        overlays = OverlayWriter(load_network(options.model, predictor), options.explain)
    rows, features = predictions.classify_files(
        predictor, arguments, options.top_k, bool(options.features), overlays
    )
    if unknown := predictions.mark_unknown(rows, options.min_probability):
        print(f"unknown   {unknown}", file=sys.stderr)
    if options.features:  # first, since standard output may be closed before its end
        predictions.write_features(options.features, rows, features)
    predictions.write(rows, options.format, sys.stdout)
    for name, place in (("features", options.features), ("overlays", options.explain)):
        if place:
            print(f"{name}  {place}", file=sys.stderr)
    if failures := predictions.describe_failures(rows):
        print(f"predict: {failures}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    # Importing TensorFlow imports Keras too, which takes a third of the time and is not needed here;
    # not so where TensorFlow is told to use an older Keras, which is rarely installed.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    cli.run("predict", main, PredictOptions, __doc__, "IMAGE|FOLDER|GLOB ...", tensorflow=False)
