"""The limits of the layout: how many modules, how long, how deep. The linter checks the layers."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "keras_cifar"
COMMANDS = {
    *("train", "evaluate", "predict", "export", "serve", "report", "compare", "tune"),
    *("benchmark", "launch"),
}

MAX_COMMAND, MAX_MODULE, MAX_CLASS, MAX_FUNCTION = 80, 450, 300, 60  # lines
MAX_DOCUMENT = {
    "README.md": 220,
    "BUILD_NOTES.md": 350,
    "CONTRIBUTING.md": 120,
    "CHANGELOG.md": 120,
}


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def lines(path: pathlib.Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_the_root_of_the_package_holds_the_commands_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__"}


def test_no_module_is_too_long():
    limits = dict.fromkeys(modules(), MAX_MODULE)
    limits |= {PACKAGE / f"{name}.py": MAX_COMMAND - 1 for name in COMMANDS}
    found = {path.relative_to(ROOT): lines(path) for path in limits if lines(path) > limits[path]}
    assert not found


@pytest.mark.parametrize(
    ("kinds", "limit"),
    [((ast.ClassDef,), MAX_CLASS), ((ast.FunctionDef, ast.AsyncFunctionDef), MAX_FUNCTION)],
    ids=["class", "function"],
)
def test_no_definition_is_too_long(kinds, limit):
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > limit:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not found


def test_every_folder_with_modules_is_a_package():
    """Otherwise setup.py would leave it out of the installation."""
    folders = {path.parent for path in modules()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_tests_mirror_the_rooms():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders == rooms | {"commands"}


@pytest.mark.parametrize("name", MAX_DOCUMENT)
def test_no_document_is_too_long(name):
    assert lines(ROOT / name) <= MAX_DOCUMENT[name]
