"""The commands and programmes that the README and the pages in docs/ print, and what is to be done with each.

The line that opens a block says it after the language, where a reader of the page does not see it:

    ```sh run                        a shell script, or one in Python; it has to succeed
    ```sh run                         it has to succeed
    ```console run                    commands after `$ `, each with the output it has to print; `...` is anything
    ```sh run until WORDS             until these words are printed, then interrupted
    ```console run without a monitor  where the others find one running
    ```sh not run: REASON             it cannot be, on a machine with neither a GPU nor a network

A comment `<!-- no block is run: REASON -->` says so for a whole page.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("sh", "bash", "console", "python", "js")

_BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_WHOLE_PAGE = re.compile(r"^<!-- no block is run: .{10,} -->$", re.MULTILINE)
_MODE = re.compile(r"run|run without a monitor|run until .+|not run: .{10,}")


@dataclass(frozen=True)
class Block:
    """One fenced block: `mode` is what its first line says after the language; empty if it says nothing."""

    page: Path
    line: int
    language: str
    mode: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page in a language that can be run."""
    content = page.read_text()
    whole = "not run: the whole page" if _WHOLE_PAGE.search(content) else ""
    found = []
    for match in _BLOCK.finditer(content):
        indent, language, mode, text = match.groups()
        if language in LANGUAGES:
            line = content.count("\n", 0, match.start()) + 1
            plain = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
            found.append(Block(page, line, language, mode.strip() or whole, plain))
    return found


def unmarked(page: Path) -> list[str]:
    """Blocks that say nothing, or nothing that is understood."""
    return [str(block) for block in blocks(page) if not _MODE.fullmatch(block.mode)]
