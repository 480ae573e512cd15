"""The examples of docstrings, which may wait as at the prompt of asyncio."""

import ast
import doctest
import inspect
import io
import traceback
from functools import partial
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def find_examples(module: ModuleType) -> list[doctest.DocTest]:
    """Return the docstrings of a module that have examples."""
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


async def run_examples(found: doctest.DocTest, **names: Any) -> list[str]:
    """Run the examples of a docstring with further names; return those that differ."""
    found.globs.update(names)
    differing = []
    for example in found.examples:
        expected = example.want if example.exc_msg is None else example.exc_msg
        output = await _run(example, found.globs)
        if not doctest.OutputChecker().check_output(expected, output, FLAGS):
            differing.append(f"{found.name}: {example.source}expected: {expected}found: {output}")
    return differing


async def _run(example: doctest.Example, names: dict[str, Any]) -> str:
    """Run an example, and return what it prints or raises.

    The standard output is left alone, as servers of the same process log there.
    """
    code = compile(example.source, "<docstring>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()
    names["print"] = partial(print, file=printed)
    with patch("sys.displayhook", lambda value: None if value is None else print(repr(value), file=printed)):
        try:
            running = FunctionType(code, names)()
            if code.co_flags & inspect.CO_COROUTINE:
                await running
        except Exception as error:  # noqa: BLE001 - an example may show any
            return traceback.format_exception_only(error)[-1]
    return printed.getvalue()
