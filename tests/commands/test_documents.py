"""The documents: their blocks run or say why not, and what they cite exists.

`<!-- slow -->` before a block runs it with -m slow alone, `<!-- not run: REASON -->` never.
"""

import contextlib
import dataclasses
import os
import pathlib
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from unittest import mock

import pytest

from tests.conftest import write_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOP = ("README.md", "BUILD_NOTES.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [ROOT / name for name in TOP] + sorted((ROOT / "docs").glob("*.md"))

BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(bash|python)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CITED = re.compile(r"`((?:keras_cifar|tests|scripts|docs)/[\w./-]*)(?:::(\w+))?`")
NAME = re.compile(r"`((?:data|models|optimizers|exporters|inference)\.[a-z_][\w.]+)\(")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@dataclasses.dataclass(frozen=True)
class Block:
    where: str
    comment: str
    language: str
    code: str

    def commands(self) -> list[tuple[str, ...]]:
        """The words of each command of bash; a Python program is one word."""
        if self.language == "python":
            return [(self.code,)]
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := tuple(shlex.split(line, comments=True)))]

    def run(self, folder: pathlib.Path) -> None:
        """Runs in `folder`, and in this process, where TensorFlow is imported already."""
        with contextlib.chdir(folder), mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
            for words in self.commands():
                if self.language == "python":
                    exec(compile(self.code, self.where, "exec"), {"__name__": "__main__"})
                    continue
                assert words[:2] == ("python", "-m"), f"{self.where}: {words} needs 'not run'"
                with mock.patch.object(sys, "argv", list(words[2:])):
                    with pytest.raises(SystemExit) as ended:
                        runpy.run_module(words[2], run_name="__main__")
                    assert not ended.value.code, words


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        where = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(where, match[1] or "", *match.groups()[1:]))
    return found


def with_comment(comment: str, pages: list[pathlib.Path], done: tuple[Block, ...] = ()) -> list:
    """Those with that comment, but for what repeats commands of `done`."""
    found = [block for page in pages for block in blocks(page) if block.comment == comment]
    commands = {words for block in done for words in block.commands()}
    return [pytest.param(b, id=b.where) for b in found if not set(b.commands()) <= commands]


QUICK = tuple(block for block in blocks(PAGES[0]) if not block.comment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A directory with a reader's images, in which the quick blocks of README have been run."""
    folder = tmp_path_factory.mktemp("documents")
    write_folder(folder / "flowers", {"": 120}, side=24)
    write_folder(folder, {"images": 6})
    shutil.copy(folder / "images/class_0/000.png", folder / "dog.png")
    for block in QUICK:
        block.run(folder)
    return folder


def test_quick_blocks_of_readme(folder):
    assert (folder / "runs" / "digits" / "export" / "2").exists()


@pytest.mark.parametrize("block", with_comment("", PAGES[1:], done=QUICK))
def test_quick_block(block, folder):
    block.run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("block", with_comment("slow", PAGES))
def test_slow_block(block, folder):
    block.run(folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page):
    assert len(blocks(page)) == len(re.findall("```(?:bash|python)", page.read_text("utf-8")))
    for block in blocks(page):
        assert re.fullmatch(r"|slow|not run: .+", block.comment), block.where


def anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_cites_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if not target.startswith(("http:", "https:")):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link
    for path, function in CITED.findall(text):
        assert (ROOT / path).exists(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text("utf-8"), function
    for name in NAME.findall(text):
        pkgutil.resolve_name(f"keras_cifar.{name}".replace(".optimizers", ".training.optimizers"))


def test_architecture_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.M)
    assert {room for room, _ in rooms} == {
        p.parent.name for p in ROOT.glob("keras_cifar/*/__init__.py")
    }
    for room, description in rooms:
        for module in re.findall(r"`(\w+(?:\.py|/))`", description):
            assert (ROOT / "keras_cifar" / room / module).exists(), f"{room}/{module}"
    for path, names in re.findall(
        r"^\| [^|]+ \| `(keras_cifar/[\w./]+\.py)` \| (.+) \|$", text, re.M
    ):
        for name in re.findall(r"`([A-Za-z_]+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text("utf-8")), f"{path}: {name}"
