"""Flags that name a place on this machine, with absolute paths. Standard library only."""

import os

NAMES = ("data", "data_dir", "cache_dir", "init_from")


def absolute(name: str, value: str) -> str:
    """The value of a flag in NAMES with an absolute path; what is no path, as `cifar10`, stays."""
    kind, path = _split(name, value)
    return kind + os.path.abspath(os.path.expanduser(path)) if path else value


def recorded(flags: dict) -> dict[str, str]:
    """The flags in NAMES that have a path, absolute: `paths` of config.json."""
    given = {name: flags[name] for name in NAMES if flags[name]}
    return {name: absolute(name, v) for name, v in given.items() if _split(name, v)[1]}


def find(config: dict, name: str) -> str | None:
    """The value of a flag of the run with this config.json, to read from.

    A relative path becomes the absolute one of the training, unless nothing is there any more and
    something is where the relative one leads now.
    """
    given, then = config["flags"][name], config["paths"].get(name)
    if then is None or os.path.isabs(_split(name, given)[1]):
        return given
    return given if _exists(name, given) and not _exists(name, then) else then


def _exists(name: str, value: str) -> bool:
    return os.path.exists(os.path.expanduser(_split(name, value)[1]))


def _split(name: str, value: str) -> tuple[str, str]:
    """("folder:", path) of `folder:path`, ("", path) of a path; the path of what is none is empty."""
    kind, colon, path = value.partition(":")
    if name == "data":
        return kind + colon, path
    return "", "" if colon or value == "imagenet" else value
