"""The wording of code, tests, protos and pages: "Words" in CONTRIBUTING.md."""

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from support.docs_pages import ROOT, pages

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.Module | ast.ClassDef | Function
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
ANY_BANNED_PHRASE = re.compile("|".join(banned.pattern for banned in BANNED_PHRASES.values()))
_GIVEN = re.compile(r"https?://\S+|[\w./-]+/[\w./#-]+|\b\w+\.(md|py|proto|toml|yml)\b|\"nobody\"|postgres or nobody")
"""Links, file names, and the system's user nobody, which are given."""


def python_files() -> list[Path]:
    """Return the Python files whose wording is checked: all but this one."""
    folders = ("service", "tests", "bench", ".ci")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))


def definitions(module: ast.Module) -> Iterator[Definition]:
    """Yield a module, and the classes and functions in it.

    Only statements are visited, since most nodes are parts of expressions.
    """
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, Definition):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            pending += getattr(node, block, ())


@cache
def docstrings() -> list[tuple[str, bool, str]]:
    """Return place and first line of each docstring, and whether it is a function's."""
    return [
        (place(path, getattr(node, "lineno", 1)), isinstance(node, Function), docstring.partition("\n")[0])
        for path in python_files()
        for node in definitions(ast.parse(path.read_text()))
        if (docstring := ast.get_docstring(node))
    ]


def suspect_prose() -> Iterator[tuple[str, str]]:
    """Yield place and text of each line of a page, proto, comment or string.

    Python files without any banned phrase are left out, since it takes long to find their comments and strings.
    """
    for path in (*pages(), *(ROOT / "proto").rglob("*.proto")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield place(path, number), line
    for path in python_files():
        if not ANY_BANNED_PHRASE.search(path.read_text()):
            continue
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
        for where, is_function, first in docstrings()
        if is_function and _first_word(first) in VAGUE_VERBS
    ]

    assert not vague, "\n".join(vague)


def test_banned_phrases_do_not_come_back() -> None:
    found = [
        f"{where}: {name}: {line.strip()}"
        for where, line in suspect_prose()
        for name, banned in BANNED_PHRASES.items()
        if banned.search(line) and banned.search(_GIVEN.sub("", line))
    ]

    assert not found, "\n".join(found)


def _first_word(text: str) -> str:
    """Return the first word of a text, in the imperative where it ends with s."""
    return text.partition(" ")[0].rstrip(".,:;").removesuffix("s")
