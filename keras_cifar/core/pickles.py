"""Reads pickles without running what they name: an interpreter of the operations that data needs.

Python's own unpickler calls what a pickle names, crashes on a dictionary key of nested tuples, and
allocates what a number in the file asks for.
"""

import copy
import dataclasses
import pickletools
import re
from collections.abc import Collection
from typing import Any, BinaryIO

# Operations in a pickle, each of up to some 100 bytes of memory. CIFAR-100's train has 4 to 9 an image.
MAX_OPERATIONS = 600_000

ORDERED_DICT = "collections.OrderedDict"  # becomes a dict

_VALUES = re.compile("(BININT|LONG1|BINFLOAT|(SHORT_)?BIN(STRING|BYTES|UNICODE)).?")
_CONSTANTS: dict[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
    "EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {},
}  # fmt: skip
# How many values an operation takes from the stack; the others take all since a MARK.
_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2}


@dataclasses.dataclass(slots=True)
class Object:
    """A function that a pickle names, or what a call of it would return. It is never called."""

    name: str
    arguments: Any = None  # what the pickle has there, usually a tuple
    state: Any = None


def load(
    source: bytes | BinaryIO,
    functions: Collection[str],
    names: Collection[str],
    what: str,
    outside: list | None = None,
) -> Any:
    """The value of a pickle in protocols 2 to 4, made of containers, numbers, bytes and `Object`s.

    Text becomes bytes, which Python 2 and protocol 2 write so. Errors of many kinds mean that the
    pickle has anything else in it, or is damaged.

    Args:
        source: the pickle, or a file that is read up to its end.
        functions: the names that may be called, which makes an `Object`.
        names: further names that may stand in the pickle.
        what: it is, for messages.
        outside: gets a value for each object that is stored outside of the pickle; None: there is none.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(source)):
        name = operation.name
        if number >= MAX_OPERATIONS:
            raise ValueError(f"it asks for more memory than a {what} does")
        if _VALUES.fullmatch(name):
            stack.append(argument.encode("latin1") if isinstance(argument, str) else argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(copy.copy(_CONSTANTS[name]))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_pop(name, stack, marks)))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            items = _pop(name, stack, marks)
            _fill(name, stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            path = argument or b" ".join(_pop(name, stack, marks)).decode()
            stack.append(Object(_known(path.replace(" ", "."), [*functions, *names], what)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(_known(function.name, functions, what), arguments))
        elif name == "BINPERSID" and outside is not None:
            outside.append(stack[-1])
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not dict:  # Attributes of an OrderedDict say nothing.
                stack[-1].state = state
        elif name == "STOP":
            break
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the operation {name}, which no {what} has")
    return stack[-1]


def _known(name: str, names: Collection[str], what: str) -> str:
    if name not in names:
        raise ValueError(f"it names {name}, which no {what} does")
    return name


def _fill(operation: str, container: Any, items: list) -> None:
    if operation.startswith("APPEND"):
        container.extend(items)
        return
    if any(type(key) is not bytes for key in items[::2]):  # Hashing may overflow C's stack.
        raise TypeError("a key is no text")
    container.update(zip(items[::2], items[1::2], strict=True))


def _called(name: str, arguments: Any) -> Any:
    if name == "_codecs.encode" and arguments[1:] == (b"latin1",):
        return arguments[0]
    return {} if name == ORDERED_DICT else Object(name, arguments)


def _pop(operation: str, stack: list, marks: list[int]) -> list:
    start = len(stack) - _SIZES[operation] if operation in _SIZES else marks.pop()
    items = stack[start:]
    del stack[start:]
    return items
