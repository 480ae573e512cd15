"""Write the client for threads from that for asyncio.

Usage: sync_client.py CLIENT FILE.
"""
# ruff: noqa: INP001 - a script

import re
import sys
from pathlib import Path

NOTICE = "Generated from client.py by `make gen`. Do not edit."
REPLACEMENTS = (
    (r'^"""The client for asyncio\.$', f'"""The client for threads.\n\n{NOTICE}'),
    (r"then await the call", "then send it"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"^import asyncio\n", ""),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"import Iterator, Awaitable, Callable, Generator, Iterable", "import Callable, Iterable, Iterator"),
    (r"\bAio(Channel|Connection)\b", r"Sync\1"),
    (r"\b(\w+Service)AsyncStub\b", r"\1Stub"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r", for the running event loop\.$", ", for any number of threads."),
    (r" Call it in the running event loop\.", ""),
    (r"\n    def __await__\(self\)(.|\n)+?\n\n\n", "\n\n"),
)
"""Patterns of the source, and what stands in their place, in this order."""


def main() -> None:
    """Read the client for asyncio, and write the other one."""
    source, target = map(Path, sys.argv[1:])
    text = source.read_text()
    for pattern, replacement in REPLACEMENTS:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if not count:
            sys.exit(f"{source} has nothing for the pattern {pattern!r}")
    target.write_text(text)


if __name__ == "__main__":
    main()
