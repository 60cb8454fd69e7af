"""Writes the report of a run as one HTML file, or of several runs side by side.

python -m keras_cifar.report RUN
python -m keras_cifar.report RUN RUN ... --out compared.html
"""

import dataclasses
import pathlib

from keras_cifar.core import cli
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import Run


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """The command's flags."""

    out: str | None = option(None, "the file (default: report.html in the first RUN)", "Report")


def main(options: ReportOptions, arguments: list[str]) -> None:
    from keras_cifar.reporting import gallery, page, record

    check(arguments, "name at least one run directory")
    too_many = f"{len(arguments)} runs are too many for one report; name at most {page.MAX_RUNS}"
    check(len(arguments) <= page.MAX_RUNS, too_many)
    runs = [Run(argument) for argument in arguments]
    records = record.load_all(runs)
    galleries = [gallery.load(*pair, len(runs)) for pair in zip(runs, records, strict=True)]
    out = pathlib.Path(options.out).expanduser() if options.out else runs[0].report
    page.write(out, records, galleries)
    for one, images in zip(records, galleries, strict=True):
        if images.missing:
            print(f"{one.name}: without images ({images.missing})")
    print(f"report    {out}")


if __name__ == "__main__":
    cli.run("report", main, ReportOptions, __doc__, "RUN ...")
