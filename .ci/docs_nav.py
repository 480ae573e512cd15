"""A mkdocs hook: navigation entries that end with "/" become a folder's pages.

The index comes first.
"""
# ruff: noqa: INP001 - mkdocs loads it by path.

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expand the folders of the navigation. Folders without pages are left out."""
    config.nav = _expand(config.nav, Path(config.docs_dir))
    return config


def _expand(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        return [expanded for each in entry if (expanded := _expand(each, docs))]
    if isinstance(entry, dict):
        return {title: expanded for title, value in entry.items() if (expanded := _expand(value, docs))}
    if entry.endswith("/"):
        pages = sorted((docs / entry).glob("*.md"), key=lambda page: (page.name != "index.md", page.name))
        return [page.relative_to(docs).as_posix() for page in pages]
    return entry
