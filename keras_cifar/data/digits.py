"""scikit-learn's 1,797 handwritten digits, which need no download.

They are the test set of the UCI data set of Alpaydin and Kaynak: 8 x 8 pixels, 17 levels of grey.
"""

import numpy as np

from keras_cifar.data.cache import Cache
from keras_cifar.data.images import resize_images
from keras_cifar.data.splits import BadImages, Split, Splits, hold_out


def load(
    argument: str,
    data_dir: str | None,
    size: tuple[int, int] | None,
    rule: str,
    cache: Cache,
    bad_images: BadImages,
) -> Splits:
    """The digits as uint8 [N, 32, 32, 3]; a fixed fifth of each class is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = size or (32, 32)  # as CIFAR: every model takes it
    images = resize_images(np.repeat(grey[..., None], 3, axis=-1), size, rule).numpy()
    labels = digits.target.astype(np.int64)
    everything, test = Split(images, labels), hold_out(labels, 0.2, seed=0)
    return Splits(
        train=everything.take(np.flatnonzero(~test)),
        val=None,
        test=everything.take(np.flatnonzero(test)),
        class_names=tuple(str(name) for name in digits.target_names),
        where="digits",
    )
