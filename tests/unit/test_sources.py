"""Citations name headings of docs/reference or public addresses."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.reference_pages import REFERENCE, anchors

ROOT = Path(__file__).parents[2]
CODE = ("service", "tests", "bench", "proto")
PROSE = ("docs", "README.md")
TEXT_SUFFIXES = {
    ".py",
    ".pyi",
    ".proto",
    ".md",
    ".txt",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".sql",
    ".sh",
    ".html",
    ".svg",
}
MARKER = re.compile(r"(?<!-> )(?<!class )\bSource" + r":(?=\s)")
"""The marker of a citation; a return type or a class of that name is none."""
LINE_START = re.compile(r"\n[ \t]*(?:#|//)?[ \t]*")
PAGE = r"docs/reference/[\w-]+\.md#[\w-]+"
ADDRESS = r"https://[^\s\"'`<>]+[^\s\"'`<>.,;:)]"
CITATIONS = re.compile(rf"\s*(?:{PAGE}|{ADDRESS})(?:(?:;| and|,) (?:{PAGE}|{ADDRESS}))*(?=[\s.,;)\"]|$)")
MENTION = re.compile(r"docs/reference/([\w-]+\.md)(?:#([\w-]+))?")
FORMER_NAME = "se" + "ed"
"""What source documents were called before they had names of their own."""


def text_files(*places: str) -> Iterator[Path]:
    """Yield the text files of some folders of the repository."""
    for place in places:
        path = ROOT / place
        for each in (path,) if path.is_file() else sorted(path.rglob("*")):
            if each.is_file() and each.suffix in TEXT_SUFFIXES and "__pycache__" not in each.parts:
                yield each


def where(path: Path, text: str, place: int) -> str:
    """Return the file and line of a place in a text."""
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, place) + 1}"


def wrong_citations(path: Path) -> Iterator[str]:
    """Yield the places of invalid citations."""
    text = path.read_text()
    for marker in MARKER.finditer(text):
        following = LINE_START.sub(" ", text[marker.end() : marker.end() + 600])
        if not CITATIONS.match(following):
            yield f"{where(path, text, marker.start())}: {following[:80].strip()}"


def dangling_mentions(path: Path) -> Iterator[str]:
    """Yield the places of headings or pages of the reference that do not exist."""
    text = path.read_text()
    for mention in MENTION.finditer(text):
        page, anchor = REFERENCE / mention[1], mention[2]
        if not page.is_file() or (anchor and anchor not in anchors(page)):
            yield f"{where(path, text, mention.start())}: {mention[0]}"


def test_every_source_is_a_heading_of_the_reference_or_a_public_address() -> None:
    wrong = [place for path in text_files(*CODE) for place in wrong_citations(path)]

    assert not wrong, "\n".join(wrong)


def test_every_mention_of_the_reference_exists() -> None:
    dangling = [place for path in text_files(*CODE, *PROSE) for place in dangling_mentions(path)]

    assert not dangling, "\n".join(dangling)


def test_source_documents_have_names_of_their_own() -> None:
    places = [
        f"{where(path, text, match.start())}: {text[match.start() - 30 : match.end() + 30]!r}"
        for path in text_files(*CODE, *PROSE)
        for text in (path.read_text(),)
        for match in re.finditer(FORMER_NAME, text, re.IGNORECASE)
    ]
    places += [str(path.relative_to(ROOT)) for path in text_files(*CODE, *PROSE) if FORMER_NAME in path.name.lower()]

    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    ("cited", "is_right"),
    [
        (" docs/reference/ledger.md#fold.", True),
        ("\n    docs/reference/ledger.md#fold; docs/reference/ledger.md#holds.", True),
        (" https://www.rfc-editor.org/rfc/rfc4647#section-3.4 and https://www.rfc-editor.org/rfc/rfc9113.", True),
        (" docs/reference/ledger.md.", False),
        (" ledger.md, fold.", False),
        (" RFC 4647, section 3.4.", False),
        (" http://example.com/page.", False),
    ],
)
def test_only_headings_and_public_addresses_are_citations(cited: str, *, is_right: bool) -> None:
    assert is_right == bool(CITATIONS.match(LINE_START.sub(" ", cited)))
