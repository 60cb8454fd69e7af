"""Flags that name a place on this machine, with absolute paths. Standard library only."""

import os

NAMES = ("data", "data_dir", "cache_dir", "init_from")


def absolute(name: str, value: str) -> str:
    """The value of a flag in NAMES with an absolute path; what is no path, as `cifar10`, stays."""
    kind, path = _split(name, value)
    return kind + os.path.abspath(os.path.expanduser(path)) if path else value


def recorded(flags: dict, before: dict | None = None) -> dict[str, str]:
    """The flags in NAMES that have a path, absolute: `paths` of config.json.

    Relative ones have that of `before`, those which config.json has, if there is one.
    """
    paths = {name: _split(name, flags[name])[1] for name in NAMES if flags[name]}
    found = {name: absolute(name, flags[name]) for name, path in paths.items() if path}
    return found | {
        name: path
        for name, path in (before or {}).items()
        if name in found and not os.path.isabs(paths[name])
    }


def same(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """The flags whose paths, of `recorded`, are equal, however they were given."""
    return {name for name, path in one.items() if path == other.get(name)}


def find(config: dict, name: str) -> str | None:
    """The value of a flag of the run with this config.json, to read from.

    A relative path becomes the absolute one of the training, unless nothing is there any more and
    something is where the relative one leads now.
    """
    given, then = config["flags"][name], config["paths"].get(name)
    gone = then is None or (not _exists(name, then) and _exists(name, given))
    return given if gone else then


def _exists(name: str, value: str) -> bool:
    return os.path.exists(os.path.expanduser(_split(name, value)[1]))


def _split(name: str, value: str) -> tuple[str, str]:
    """("folder:", path) of `folder:path`, ("", path) of a path; the path of what is none is empty."""
    kind, colon, path = value.partition(":")
    if name == "data":
        return kind + colon, path
    return "", "" if colon or value == "imagenet" else value
