"""README.md and the pages of docs/, and the shell lines that they show."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class ShellLine:
    """A shell line of a page, and the output printed below it, which may be empty."""

    command: str
    printed: str


def pages() -> list[Path]:
    """Return README.md, the pages of the navigation in its order, then all others."""
    listed = [DOCS / name for name in re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)]
    return [README, *listed, *sorted(set(DOCS.rglob("*.md")) - set(listed))]


def blocks_of(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines_of(text: str) -> list[ShellLine]:
    """Return the lines that a text shows with a prompt, in their order."""
    lines = []
    for block in blocks_of(text, "console"):
        for item in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = item.partition("\n")
            lines.append(ShellLine(command, printed.strip()))
    return lines
