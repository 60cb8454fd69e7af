"""Random crops of JPEG photographs: ours beside torchvision's transform in PyTorch's DataLoader."""

import io
import pathlib
import tempfile

from keras_cifar.benchmarking.contest import Contest, percentages, print_table, show
from keras_cifar.benchmarking.options import BenchmarkOptions

OURS, DECODED, PEER = "crops of files", "from decoded images", "torchvision, 2 workers"
AUGMENT = "resized_crop|flip"
IMAGE_SIZE = 224

COUNT, WIDTH, HEIGHT = 2000, 500, 375
MOTIFS = 50  # that differ; the others are copies
QUALITY = 94  # about 95 kB each
DETAIL = 0.9  # how much weaker a pattern is than that of twice its size


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints images a second of a pipeline from files to batches."""
    with tempfile.TemporaryDirectory() as scratch, Contest(options) as contest:
        folder = pathlib.Path(scratch) / "photos"
        size = write(folder)
        images = {"data": f"folder:{folder}", "image_size": IMAGE_SIZE}
        images |= {"cache_dir": scratch, "augment": AUGMENT}
        contest.add(OURS, "ours", what="pipeline", **images)
        contest.add(DECODED, "ours", what="pipeline", **images | {"augment": "crop(28)|flip"})
        if options.peers:
            contest.add(PEER, "torchvision_loader", data=str(folder / "train"), size=IMAGE_SIZE)
        measured = contest.take_turns()
        shares = contest.kernel_shares(**images)
    print(
        f"{COUNT:,} JPEG files of {WIDTH} x {HEIGHT}, {size / 1e3:.0f} kB each, to {IMAGE_SIZE}\n"
    )
    print_table("images a second", "median", 34, measured)
    if PEER in measured:
        print(f"\n{measured[OURS]['median'] / measured[PEER]['median']:>8.2f}  {OURS} / {PEER}")
    print(f"time of its kernels: {percentages(shares)}")
    return {"measured": measured, "shares": shares}


def write(folder: pathlib.Path) -> float:
    """Writes COUNT photographs of ten classes to `folder/train`, some to `test`; their mean bytes."""
    motifs = []
    for number in range(MOTIFS):
        show(f"making photographs {number} of {MOTIFS}")
        motifs.append(_photograph(number))
    for number in range(COUNT + 10):
        path = folder / ("train" if number < COUNT else "test") / f"class_{number % 10}"
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number}.jpg").write_bytes(motifs[number % MOTIFS])
    return sum(map(len, motifs)) / MOTIFS


def _photograph(seed: int) -> bytes:
    """A JPEG file of patterns of all sizes, with less of the small ones, as photographs have."""
    import numpy as np
    from PIL import Image

    random, total = np.random.default_rng(seed), np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for octave in range(2, 9):
        height, width = min(3 * 2**octave // 4, HEIGHT), min(2**octave, WIDTH)
        small = random.normal(size=(height, width, 3)).astype(np.float32)
        small[..., 1:] = small[..., :1] + 0.35 * small[..., 1:]  # mostly grey
        for channel in range(3):
            image = Image.fromarray(small[..., channel]).resize((WIDTH, HEIGHT), Image.BICUBIC)
            total[..., channel] += np.asarray(image) * DETAIL**octave
    pixels = 128 + 55 * (total - total.mean()) / total.std()
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
