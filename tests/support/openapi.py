"""docs/openapi.json, and JSON checked against it."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

from support.processes import ROOT

FILE = ROOT / "docs" / "openapi.json"
FORMATS = FormatChecker(["date-time"])


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


@cache
def _strict_components() -> dict[str, Any]:
    """Return the components, whose objects have no other properties."""
    components: dict[str, Any] = json.loads(json.dumps(document()["components"]), object_hook=_closed)
    return components


def _closed(found: dict[str, Any]) -> dict[str, Any]:
    is_object = found.get("type") == "object" and "properties" in found
    return {**found, "additionalProperties": False} if is_object else found


def schema_errors(schema: Mapping[str, Any], value: Any) -> list[str]:
    """Return how a value differs from a schema of the document."""
    closed = json.loads(json.dumps(schema), object_hook=_closed)
    validator = Draft202012Validator({**closed, "components": _strict_components()}, format_checker=FORMATS)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the verb, the path and the operation of each."""
    for path, item in document()["paths"].items():
        for verb, operation in item.items():
            yield verb, path, operation


def find_operation(verb: str, path: str) -> dict[str, Any] | None:
    """Return the operation of a request, or None if no path matches."""
    matching = [
        (template.count("{"), operation)
        for each, template, operation in operations()
        if each == verb.lower() and _pattern(template).fullmatch(path)
    ]
    return min(matching, key=lambda found: found[0])[1] if matching else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{[^}]*\\}", "[^/:]*", re.escape(template)))
