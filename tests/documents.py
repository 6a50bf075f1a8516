"""What README and docs show: their blocks of Python, the commands in them, and what programs print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "weights" / "README.md"]
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_FILE_NAME = re.compile(r"# (\w+\.py)\n")
# Where a line calls a program that this project has, or that installs it.
_CALL = re.compile(r"(?:- run: )?(?=(?:\S*/)?(?:van-port|pip|python3?|mkdocs|bash) )")


@dataclass(frozen=True)
class Command:
    """One call of a program in a block of a page."""

    page: Path
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return Path(self.words[0]).name

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)}"


def python_blocks(page: Path) -> list[str]:
    return _PYTHON.findall(page.read_text())


def python_files() -> dict[str, str]:
    """The blocks that say in their first line which file they are, such as `# models.py`."""
    blocks = [block for page in GUIDES for block in python_blocks(page)]
    return {match[1]: block for block in blocks if (match := _FILE_NAME.match(block))}


def text_blocks(page: Path) -> Iterator[list[str]]:
    """The lines of every block that holds commands or what programs print, continued lines joined."""
    text = page.read_text()
    blocks = [body for language, body in _FENCED.findall(text) if language not in {"python", "json", "toml"}]
    rest = _FENCED.sub("", text)
    blocks += [re.sub("^ {4}", "", body, flags=re.MULTILINE) for body in re.findall(r"(?:^ {4}.*\n)+", rest, re.M)]
    for body in blocks:
        yield re.sub(r" *\\\n *", " ", body).splitlines()


def commands(page: Path) -> list[Command]:
    """Every command in the page's blocks."""
    found = []
    for lines in text_blocks(page):
        for line in lines:
            if match := _CALL.match(line := line.strip()):
                for part in line[match.end() :].split(" && "):
                    found.append(Command(page, tuple(shlex.split(part, comments=True))))
    return found


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks in the text around the blocks."""
    rest = re.sub(r"^ {4}.*\n", "", _FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return [" ".join(code.split()) for code in _INLINE.findall(rest)]
