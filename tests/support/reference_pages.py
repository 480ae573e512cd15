"""The pages of docs/reference, as tests read them."""

import re
from collections.abc import Iterator
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "docs/reference"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
TABLE_HEAD = re.compile(r"^\|.*\n\|-.*\n", re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's headings, as MkDocs and GitHub build them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]


def section(page: str, heading: str) -> str:
    """Return the text of a section of a page. Raises LookupError."""
    text = (REFERENCE / page).read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{page} has no heading {heading!r}")
    return found[1]


def table_rows(page: str, heading: str) -> Iterator[list[str]]:
    """Yield the cells of each row of a section's tables, without the tables' heads."""
    for line in TABLE_HEAD.sub("", section(page, heading)).splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]
