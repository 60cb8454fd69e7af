"""Progressive resizing: smaller images in the first epochs, which take less time.

Howard et al. 2018, "Training Imagenet in 3 hours for USD 25", fast.ai.
"""

import math

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.core.image_size import resizing_stages
from keras_cifar.models.classifier import Classifier
from keras_cifar.models.resizing import Size, takes

Stage = tuple[Size, int]  # images' height and width, and the epochs done when it ends


def stages(config: TrainConfig, model: Classifier) -> list[Stage]:
    """The stages of --progressive_resizing that have an epoch; the last epochs have whole images.

    Raises:
        UsageError: a stage's images are not smaller, or the network cannot take them.
    """
    text, found = config.fit.progressive_resizing, []
    sides = model.inputs[0].shape[1:3]
    for pixels, share in resizing_stages(text):
        if pixels >= min(sides):
            raise UsageError(
                f"--progressive_resizing={text} must be below the images' own {min(sides)} pixels"
            )
        size = tuple(round(side * pixels / min(sides)) for side in sides)
        if not takes(model.logits_model, size):
            raise UsageError(
                f"--progressive_resizing={text}: {model.name} for {min(sides)} pixels cannot take "
                f"{pixels}; give more, or a network with global pooling, such as resnet32"
            )
        # The product of the decimals may be just below the number that is meant.
        end = int(share * config.fit.epochs + 1e-9)
        if end > (found[-1][1] if found else 0):
            found.append((size, end))
    return found


def size_of(found: list[Stage], epoch: int) -> Size | None:
    """The size of an epoch's images, the first being 0; None: their own."""
    return next((size for size, end in found if epoch < end), None)


def pixels_of(found: list[Stage], epoch: int, sides: Size) -> int:
    """The pixels of an epoch's images, whose own sides are `sides`; its time is in proportion."""
    return math.prod(size_of(found, epoch) or sides)
