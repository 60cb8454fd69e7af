"""Command lines: a frozen dataclass -> flags -> an instance of it; errors -> exit status.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
import typing
from collections.abc import Callable

from absl import flags

from keras_cifar.core import environment, errors, recipes
from keras_cifar.core.options import build, fields
from keras_cifar.core.signals import STOP

OUT_OF_MEMORY = "out of memory; a smaller --batch_size or --image_size needs less"


def run(
    name: str,
    main: Callable,
    options_class: type,
    doc: str,
    arguments: str = "",
    tensorflow: bool = True,
) -> None:
    """Parses sys.argv into `options_class`, calls `main(options[, positional])` and exits.

    Args:
        name: the module of the command in this package, or the path of a script.
        main: takes the options and, if `arguments` is given, the positional arguments; returns the
            exit status, or None for 0.
        options_class: a frozen dataclass whose fields were made with `options.option`.
        doc: the description for --help.
        arguments: the positional arguments as --help shows them.
        tensorflow: whether to import TensorFlow, without its start-up messages, before `main`.
    """
    argv = sys.argv[1:]
    if {"--help", "-help", "-h"} & set(argv[: argv.index("--")] if "--" in argv else argv):
        command = f"python {name}" if "/" in name else f"python -m keras_cifar.{name}"
        print(usage(options_class, doc, command, arguments))
        sys.exit(0)
    status = _execute(name, main, options_class, arguments, argv, tensorflow)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # All is done; Python would print where it stops.
    sys.exit(status)


def _execute(
    name: str,
    main: Callable,
    options_class: type,
    arguments: str,
    argv: list,
    tensorflow: bool = True,
) -> int:
    def fail(message: str, status: int = 1) -> int:
        print(f"{name}: error: {errors.one_line(message)}", file=sys.stderr)
        return status

    try:
        with STOP.handled():
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
            options, positional = parse(options_class, argv)
            if positional and not arguments:
                message = f"unexpected argument {positional[0]!r}; flags begin with --"
                raise errors.UsageError(message)
            if tensorflow:
                environment.import_tensorflow()
            status = main(options, positional) if arguments else main(options)
            sys.stdout.flush()
            return status or 0
    except (errors.LostWorkerError, errors.StoppedError) as error:
        fail(str(error))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(error.status)
    except errors.UserError as error:
        return fail(str(error), error.status)
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; nothing more can be written.
        sys.stdout = None
        return 1
    except OSError as error:
        return fail(f"{errors.reason(error)}: {error.filename}" if error.filename else str(error))
    except Exception as error:
        if errors.is_out_of_memory(error):
            return fail(OUT_OF_MEMORY)
        raise


def parse(options_class: type, argv: list) -> tuple:
    """(an instance of `options_class`, positional arguments) from a command line.

    --flagfile=FILE reads flags from a file, one a line. The flags of --recipe are read before all
    others, so that all others override them.

    Raises:
        UsageError: an unknown flag, or a value out of its range.
    """
    given, positional = _read(options_class, argv)
    if recipe := given.get("recipe"):
        given, positional = _read(options_class, [f"--flagfile={recipes.find(recipe)}", *argv])
    for field in fields(options_class):
        value, choices = given[field.name], field.metadata["choices"]
        if why := field.metadata["refused"].get(value):
            raise errors.UsageError(f"--{field.name}={value}: {why}")
        if choices and value not in choices:
            raise errors.unknown(f"--{field.name}", value, choices)
    return build(options_class, given), positional


def _read(options_class: type, argv: list) -> tuple[dict, list]:
    """(the value of each flag, positional arguments) of a command line."""
    define: dict[type, Callable] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    values = flags.FlagValues()
    for field in fields(options_class):
        define[_kind(field)](field.name, field.default, "", flag_values=values)
        for alias in field.metadata["aliases"]:
            flags.DEFINE_alias(alias, field.name, flag_values=values)
    values.set_gnu_getopt(True)
    try:
        positional = values(["", *argv])[1:]
    except (flags.Error, ValueError) as error:  # the latter of `--noexport=`
        raise errors.UsageError(f"{errors.reason(error)} (--help lists the flags)") from None
    return {f.name: values[f.name].value for f in fields(options_class)}, positional


def _kind(field: dataclasses.Field) -> type:
    """The type of a field: `int` for `int` and for `int | None`."""
    kinds = typing.get_args(field.type) or (field.type,)
    return next(kind for kind in kinds if kind is not type(None))


def usage(options_class: type, doc: str, command: str, arguments: str = "") -> str:
    """The text of --help."""
    lines = [f"usage: {' '.join(filter(None, [command, '[flags]', arguments]))}", "", doc.strip()]
    group = None
    for field in fields(options_class):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"{group}:"]
        kind, choices = _kind(field), field.metadata["choices"]
        if kind is bool:
            head = f"--[no]{field.name}"
        else:
            head = f"--{field.name} {'|'.join(choices) if choices else kind.__name__.upper()}"
        default = "on" if field.default is True else field.default
        default = f" (default: {default})" if default else ""
        text = textwrap.wrap(field.metadata["help"] + default, 66)
        lines.append(f"  {head}" if len(head) > 22 else f"  {head:<24}{text.pop(0)}")
        lines += [" " * 26 + line for line in text]
    lines += ["", "  --flagfile FILE         reads flags from a file, one a line"]
    return "\n".join(lines)
