"""Inference with an exported SavedModel alone: without Keras, training code or the run."""

import pathlib
from collections.abc import Collection

import numpy as np
import tensorflow as tf

from keras_cifar.core import environment
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import read, versions
from keras_cifar.core.image_size import CROP, STRETCH

# Only models whose images are cropped have this signature: of files that have the model's size already.
# `serving_bytes` would scale and crop these again. A server tells no more than the signatures.
CROPPED = "serving_cropped"

MAX_LABELS = 2**26  # bytes of labels.txt; ImageNet-21k's take under a megabyte


def find(path: str) -> pathlib.Path:
    """Finds a SavedModel: the directory itself, its newest version, or a run's newest export.

    Raises UserError if there is none.
    """
    root = pathlib.Path(path).expanduser()
    if "://" in path:
        raise UserError(f"--model={path}: only directories, http:// and grpc:// URLs can be read")
    if not root.exists():
        raise UserError(f"--model={path} does not exist")
    for base in (root, root / "export"):
        numbers = versions(base)
        candidate = base / str(numbers[-1]) if numbers else base
        if (candidate / "saved_model.pb").is_file():
            return candidate
    raise UserError(
        f"--model={path} holds no SavedModel; expected saved_model.pb, <version>/saved_model.pb or "
        "a run with export/<version>/ (python -m keras_cifar.export --run RUN makes one)"
    )


def rule_of(signatures: Collection[str]) -> str:
    """The rule of `data.images.resize_images` for a model with these signatures."""
    return CROP if CROPPED in signatures else STRETCH


class Predictor:
    """A loaded SavedModel.

    Attributes:
        size: (height, width) of the input images, in pixels.
        rule: by which images get this size, see `data.images.resize_images`.
        class_names: in the order of the probabilities.
        signatures: the model's functions, by name.
    """

    def __init__(self, path: str):
        """Loads the model that `find(path)` finds.

        Raises:
            UserError: there is none, it is damaged, or it has other signatures than ours.
        """
        self.path = find(path)
        try:
            # Kept, since the signatures do not keep the variables alive.
            self._loaded = tf.saved_model.load(str(self.path))
            self._use(dict(self._loaded.signatures))
            self.size = tuple(self._classify.structured_input_signature[1]["images"].shape[1:3])
            labels = self.path / "assets" / "labels.txt"
            self.class_names = tuple(read(labels, MAX_LABELS).decode("utf-8").splitlines())
            if len(self.class_names) != self._classify.structured_outputs["probabilities"].shape[1]:
                raise ValueError(f"{labels.name} does not name its classes")
        except Exception as error:  # Damage raises any of a dozen classes.
            raise UserError(f"{self.path} is not a valid model: {reason(error)}") from None

    def _use(self, signatures: dict) -> None:
        self.signatures, self.rule = signatures, rule_of(signatures)
        self._classify, self._features = signatures["serving_default"], signatures["features"]

    def choose_precision(self, choice: str) -> tuple[str, str]:
        """(in what the functions are computed, why) for `--dtype_policy=choice` of config.PRECISIONS.

        With "auto" TensorFlow rewrites them to bfloat16 on a CPU that is faster with it, here as in all
        of this process: call it for the process's only model, before that computes anything.
        """
        if choice == "float32":
            return "float32", "by --dtype_policy"
        policy, why = environment.dtype_policy("auto")
        graph = self._classify.graph.as_graph_def()
        if policy == "float32" or tf.config.list_physical_devices("GPU"):
            return "float32", why
        if b"DepthwiseConv2d" in graph.SerializeToString():
            return environment.DEPTHWISE_POLICY
        rewriting = {"auto_mixed_precision_onednn_bfloat16": True}
        tf.config.optimizer.set_experimental_options(rewriting)
        return "bfloat16", why

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, K] of uint8 [N, H, W, 3], N of any size."""
        return self._run(self._classify, "probabilities", images)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Feature vectors float32 [N, D] of uint8 [N, H, W, 3]: the input of the classifier layer."""
        return self._run(self._features, "features", images)

    @staticmethod
    def _run(signature, output: str, images: np.ndarray) -> np.ndarray:
        """Computes an output of a signature in batches, so that memory does not grow with N."""
        # No call without images: oneDNN's kernels fail on an empty batch.
        rows = [np.empty((0, signature.structured_outputs[output].shape[1]), np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = tf.constant(images[start : start + BATCH_SIZE])
            rows.append(signature(images=batch)[output].numpy())
        return np.concatenate(rows)
