"""Compares runs: accuracy on the test images, time, speed, and the flags that differ.

python -m keras_cifar.compare RUN OTHER_RUN --out comparison.png

A directory of --seeds counts as one run: its mean and standard deviation, and a band in the image. Of a
study of tune all trials are shown, the best first; the image has the best eight.
"""

import dataclasses
import pathlib

from keras_cifar.core import cli
from keras_cifar.core.errors import one_line
from keras_cifar.core.options import check, option

SHOWN = 8  # trials of a study in the image, which has as many colours


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The command's flags."""

    out: str | None = option(
        None,
        "also draw validation accuracy over epochs and over time, to this .png file",
        "Comparison",
    )

    def __post_init__(self):
        png = self.out is None or self.out.lower().endswith(".png")
        check(png, f"--out={self.out} must end with .png")


def main(options: CompareOptions, arguments: list[str]) -> None:
    check(arguments, "name at least one run directory")
    from keras_cifar.reporting import comparison, study

    studies = {path: trials for path in arguments if (trials := study.load(path))}
    entries = [comparison.load(path) for path in arguments if path not in studies]
    texts = [comparison.table(entries), comparison.differences(entries)] if entries else []
    texts += [f"{path}\n{study.table(trials)}" for path, trials in studies.items()]
    print("\n\n".join("\n".join(map(one_line, t.splitlines())) for t in texts if t))
    if options.out:
        path = pathlib.Path(options.out).expanduser()
        for name, trials in studies.items():
            entries += map(comparison.load, study.trained(name, trials)[:SHOWN])
        comparison.draw(entries, path)
        print(f"\nimage     {path}")


if __name__ == "__main__":
    cli.run("compare", main, CompareOptions, __doc__, "RUN ...", tensorflow=False)
