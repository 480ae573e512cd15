"""README.md and docs/ name only settings, metrics, commands and files that exist."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import typer

from pointbook_cli.main import app
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings
from support.docs_pages import DOCS, README, ROOT, blocks_of, pages, shell_lines_of

README_BYTES_MAX = 9_000
SETTINGS = {f"POINTBOOK_{name.upper()}" for each in (ServerSettings, ShimSettings) for name in each.model_fields}
SETTING = re.compile(r"\bPOINTBOOK_[A-Z0-9_]*[A-Z0-9]\b(?![_*…])")
METRIC = re.compile(r"`(pointbook_[a-z_]+)`")
COMMAND = re.compile(r"(?:^|\s)(?:\.venv/bin/)?pointbook\s+([a-z].*)")


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= README_BYTES_MAX


def test_links_of_the_readme_lead_to_pages() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())

    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_settings_that_pages_name_exist() -> None:
    known = SETTINGS | {f"{name}_FILE" for name in SETTINGS}

    assert unknown_on_pages(lambda text: set(SETTING.findall(text)) - known) == {}


def test_metrics_that_pages_name_exist() -> None:
    packages = {path.name for path in (ROOT / "service").iterdir()}
    sources = "\n".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))

    def unknown(text: str) -> set[str]:
        named = {name.removesuffix("_total") for name in METRIC.findall(text)} - packages
        # The server adds the prefix itself.
        return {name for name in named if not re.search(rf'"(pointbook_)?{name.removeprefix("pointbook_")}"', sources)}

    assert unknown_on_pages(unknown) == {}


def test_commands_and_options_that_pages_show_exist() -> None:
    def unknown(text: str) -> set[str]:
        shown = [
            line for language in ("sh", "bash") for block in blocks_of(text, language) for line in block.splitlines()
        ]
        shown += [line.command for line in shell_lines_of(text)]
        shown += re.findall(r"`(pointbook [a-z][^`]*)`", text)
        return {f"{word} in: {line}" for line in shown for word in unknown_words(line)}

    assert unknown_on_pages(unknown) == {}


def test_files_that_the_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    names = re.findall(r"`([\w/]+\.py)`", text)
    files = [path.as_posix() for path in (ROOT / "service").rglob("*.py")]

    assert names
    assert [name for name in names if not any(file.endswith(f"/{name}") for file in files)] == []
    folders = {path.name for path in (*ROOT.glob("*/"), *(ROOT / "service").rglob("*/"))}
    assert set(re.findall(r"`(\w+)/`", text)) <= folders


def test_decisions_are_numbered_and_listed() -> None:
    folder = DOCS / "decisions"
    files = sorted(path.name for path in folder.glob("[0-9]*.md"))
    listed = re.findall(r"\]\(([0-9]{4}-[a-z0-9-]+\.md)\)", (folder / "index.md").read_text())

    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    assert sorted(listed) == files
    for name in files:
        assert (folder / name).read_text().startswith(f"# {name[:4]}: ")


def unknown_on_pages(unknown: Callable[[str], set[str]]) -> dict[str, set[str]]:
    """Return what a check does not recognize on each page that has such words."""
    found = {str(page.relative_to(ROOT)): unknown(page.read_text()) for page in pages()}
    return {page: words for page, words in found.items() if words}


def unknown_words(line: str) -> list[str]:
    """Return the words of a shell line that `pointbook` does not know."""
    match = COMMAND.search(line)
    if match is None:
        return []
    current: Any = typer.main.get_command(app)
    for word in shlex.split(match.group(1).split("  ")[0], comments=True):
        if hasattr(current, "commands") and not word.startswith("-"):
            if word not in current.commands:
                return [word]
            current = current.commands[word]
        elif word.startswith("--") and word not in {name for each in current.params for name in each.opts}:
            return [word]
    return []
