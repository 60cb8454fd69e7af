"""The flags --image_size, --resize and --progressive_resizing: which sides images get, when and how.

Standard library only: --help reads it.
"""

import itertools
import re

from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.core.options import check

# Images up to this side, in pixels, get the small-image form of networks made for ImageNet, and
# --resize=auto keeps all of them, as the tutorial does.
SMALL_IMAGE = 64

STRETCH, CROP = "stretch", "crop"  # the rules of `data.images.resize_images`
RESIZE = ("auto", STRETCH, CROP)
_SIZE = re.compile(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", re.ASCII)
_STAGE = re.compile(r"([1-9]\d{0,8}):(0?\.\d{1,9})", re.ASCII)


def image_sides(image_size: str | int | None) -> tuple[int, int] | None:
    """(height, width) in pixels of an --image_size; None of None, each image's own size.

    Raises:
        UsageError: it is neither N nor HEIGHTxWIDTH.
    """
    if image_size is None:
        return None
    # config.json of earlier revisions has an integer. To Python, a bool is one.
    match = None if isinstance(image_size, bool) else _SIZE.fullmatch(str(image_size))
    if match is None:
        raise UsageError(
            f"--image_size={image_size} must be a number of pixels or HEIGHTxWIDTH, such as 224 or "
            "192x256"
        )
    return int(match[1]), int(match[2] or match[1])


def size_text(image_size: str | int | None) -> str | None:
    """An --image_size in its one form as text: `32` of 32, of `32` and of `32x32`."""
    sides = image_sides(image_size)
    return sides and (str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}")


def resizing_stages(text: str) -> tuple[tuple[int, float], ...]:
    """((shorter side in pixels, share of the epochs at which the stage ends), ...) of a
    --progressive_resizing such as `24:0.4,28:0.7`; none of an empty one.

    Raises:
        UsageError: it has another form, or sides or shares do not increase.
    """
    matches = [_STAGE.fullmatch(part) for part in text.split(",")] if text else []
    stages = tuple((int(match[1]), float(match[2])) for match in matches if match)
    columns = zip(*stages, strict=True)
    rising = all(a < b for column in columns for a, b in itertools.pairwise(column))
    check(
        len(stages) == len(matches) and rising and all(share for _, share in stages),
        f"--progressive_resizing={text} must be PIXELS:SHARE,... with rising pixels and shares of the "
        "epochs between 0 and 1, such as 24:0.4,28:0.7",
    )
    return stages


def resize_rule(resize: str, image_size: str | int | None) -> str:
    """The rule, STRETCH or CROP, that --resize means for an --image_size.

    Raises:
        UsageError: an unknown rule, an invalid size, or a crop to no size.
    """
    sides = image_sides(image_size)
    if resize not in RESIZE:
        raise unknown("--resize", resize, RESIZE)
    if resize == "auto":
        return CROP if sides and min(sides) > SMALL_IMAGE else STRETCH
    check(resize == STRETCH or sides is not None, "--resize=crop needs --image_size")
    return resize
