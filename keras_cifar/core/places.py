"""Flags that name a place on this machine, with absolute paths. Standard library only."""

import os

NAMES = ("data", "data_dir", "cache_dir", "init_from")


def absolute(name: str, value: str) -> str:
    """The value of a flag in NAMES with an absolute path; what is no path, as `cifar10`, stays."""
    kind, path = _split(name, value)
    return kind + os.path.abspath(os.path.expanduser(path)) if path else value


def _split(name: str, value: str) -> tuple[str, str]:
    """("folder:", path) of `folder:path`, ("", path) of a path; the path of what is none is empty."""
    kind, colon, path = value.partition(":")
    if name == "data":
        return kind + colon, path
    return "", "" if colon or value == "imagenet" else value
