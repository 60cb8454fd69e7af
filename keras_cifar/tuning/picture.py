"""Optuna's plots of a study as one picture."""

import io
import warnings

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.visualization import matplotlib as plots
from PIL import Image

from keras_cifar.evaluation.plots import DPI

SIZE = (8, 5)  # inches of each plot
VALUE = {"target_name": "validation accuracy"}
PLOTS = (
    (plots.plot_optimization_history, VALUE),
    (plots.plot_intermediate_values, {}),
    (plots.plot_parallel_coordinate, VALUE),
    (plots.plot_param_importances, VALUE),  # needs two trials
)


def draw(study: optuna.Study) -> Image.Image:
    """Accuracy by trial, accuracy by epoch, flags of the trials, and the importance of the flags."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    sheet = None
    matplotlib.use("agg")
    # Optuna changes the style, and warns where all trials are equal.
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        for index, (plot, options) in enumerate(PLOTS if len(done) > 1 else PLOTS[:-1]):
            figure, file = plot(study, **options).figure, io.BytesIO()
            figure.set(size_inches=SIZE, layout_engine="tight")
            figure.savefig(file, dpi=DPI)
            pyplot.close(figure)
            with Image.open(file) as image:
                width, height = image.size
                sheet = sheet or Image.new("RGB", (2 * width, 2 * height), "white")
                sheet.paste(image, (index % 2 * width, index // 2 * height))
    return sheet
