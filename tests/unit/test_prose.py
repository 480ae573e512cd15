"""The wording of code, tests, protos and pages: "Words" in CONTRIBUTING.md."""

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from support.docs_pages import ROOT, pages

FIRST_LINE_LENGTH_MAX = 80
VAGUE_VERBS = frozenset(
    "Answer Be Begin Forget Give Hear Keep Know Learn Let Mend Say See Take Tell".split()  # noqa: SIM905 - shorter
)
"""Verbs that do not say what a function returns or does."""
BANNED_PHRASES = {
    name: re.compile(pattern)
    for name, pattern in {
        "pronouns without a noun": r"\b([Ww]hoever|[Ww]homever|[Ww]hatever|[Nn]obody|[Ss]omebody)\b",
        "speaks against": r"\bsp(eak|oke)s? against\b",
        "what there is": r"\b[Ww]hat (there (is|are)|is wanted)\b",
        "by then": r"\b[Bb]y then\b",
        "in vain": r"\b[Ii]n vain\b",
        "all the same": r"\b[Aa]ll the same\b",
        "so as to": r"\b[Ss]o as to\b",
        "know of, tell of": r"\b(knows?|tells?|told) of\b",
        "of ours": r"\b(fault|defect|error|name)s? of ours\b",
        "unpublished pages": r"\b([Tt]he spec|[Ss]pecification page)\b",
    }.items()
}
_GIVEN = re.compile(r"https?://\S+|[\w./-]+/[\w./#-]+|\b\w+\.(md|py|proto|toml|yml)\b|\"nobody\"|postgres or nobody")
"""Links, file names, and the system's user nobody, which are given."""


def python_files() -> list[Path]:
    """Return the Python files whose wording is checked: all but this one."""
    folders = ("service", "tests", "bench", ".ci")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))


@cache
def docstrings() -> list[tuple[str, ast.AST, str]]:
    """Return the place, the definition and the first line of each docstring."""
    return [
        (place(path, getattr(node, "lineno", 1)), node, docstring.partition("\n")[0])
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (docstring := ast.get_docstring(node))
    ]


def prose() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line of a page, a proto, a comment or a string."""
    for path in (*pages(), *(ROOT / "proto").rglob("*.proto")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield place(path, number), line
    for path in python_files():
        # Released migrations cannot change their strings.
        kinds = {"COMMENT"} if path.parent.name == "versions" else {"COMMENT", "STRING", "FSTRING_MIDDLE"}
        with tokenize.open(path) as source:
            for token in tokenize.generate_tokens(source.readline):
                if tokenize.tok_name[token.type] in kinds:
                    for number, line in enumerate(token.string.splitlines(), token.start[0]):
                        yield place(path, number), line


def place(path: Path, line: int) -> str:
    """Return where a line is, as compilers write it."""
    return f"{path.relative_to(ROOT)}:{line}"


def test_first_lines_of_docstrings_are_short() -> None:
    long = [f"{where}: {first}" for where, _, first in docstrings() if len(first) > FIRST_LINE_LENGTH_MAX]

    assert not long, "\n".join(long)


def test_docstrings_of_functions_open_with_a_precise_verb() -> None:
    vague = [
        f"{where}: {first}"
        for where, node, first in docstrings()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _first_word(first) in VAGUE_VERBS
    ]

    assert not vague, "\n".join(vague)


def test_banned_phrases_do_not_come_back() -> None:
    found = [
        f"{where}: {name}: {line.strip()}"
        for where, line in prose()
        for name, banned in BANNED_PHRASES.items()
        if banned.search(line) and banned.search(_GIVEN.sub("", line))
    ]

    assert not found, "\n".join(found)


def _first_word(text: str) -> str:
    """Return the first word of a text, in the imperative where it ends with s."""
    return text.partition(" ")[0].rstrip(".,:;").removesuffix("s")
