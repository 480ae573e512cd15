"""Checks of a command's settings.

All problems are in one line, without values, which may be secrets.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from pointbook_common.secret_files import FILE_SUFFIX, secret_file_fields
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

PREFIX = "POINTBOOK_"
MISSING = {
    "database_url": "is not set; `pointbook dev` runs on an embedded database without it",
    "shopline_secrets": "is not set, and neither is POINTBOOK_SHOPLINE_ENDPOINTS: the shim could not detect a "
    "forged webhook",
}
"""The message for a required setting that is missing."""
ALTERNATIVES = {"shopline_secrets": "shopline_endpoints"}
"""Required settings, and the setting that replaces each."""
_SERVICE_LINK = re.compile(r"POINTBOOK(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
"""Variables that Kubernetes sets in containers for services named `pointbook` or `pointbook-…`."""
_LINK_PORT = re.compile(r"POINTBOOK(_\w+)?_PORT")
_NOT_VISIBLE = re.compile(r"[^!-~]")
"""Names of variables may contain line breaks and invalid UTF-8."""


def settings_problems(
    classes: Iterable[type[BaseSettings]],
    environment: Mapping[str, str],
    *,
    required: Iterable[str] = (),
    overrides: Mapping[str, Any],
) -> list[str]:
    """Return one clause for each invalid, missing or unknown setting.

    `required` are names of fields.
    """
    problems: dict[str, str] = {}
    given = {name.upper(): value for name, value in environment.items()}
    for settings_class in classes:
        # Report a setting of several classes once, with the message of the first.
        problems = _problems_of(settings_class, overrides) | problems
    for name in required:
        # A list of secrets may consist of commas only.
        names = [variable(each) for each in (name, ALTERNATIVES.get(name, name))]
        is_given = any(given.get(each, "").strip(" \t\r\n,") or given.get(each + FILE_SUFFIX) for each in names)
        if not overrides.get(name) and not is_given:
            problems.setdefault(variable(name), MISSING[name])
    clauses = [f"{name}: {problem}" for name, problem in sorted(problems.items())]
    return [*clauses, *unknown_variables(environment)]


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return one clause for each unknown POINTBOOK_* variable.

    It suggests the most similar setting.
    """
    classes = (ServerSettings, ShimSettings)
    known = [name.upper() for settings in classes for name in settings.model_fields]
    known += [name.upper() + FILE_SUFFIX for settings in classes for name in secret_file_fields(settings)]
    problems = []
    for name, value in sorted(environment.items()):
        prefix, setting = name[: len(PREFIX)].upper(), name[len(PREFIX) :].upper()
        if prefix != PREFIX or setting in known or _is_service_link(name, value):
            continue
        near = difflib.get_close_matches(setting, known, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        problems.append(f"{_NOT_VISIBLE.sub('?', name)}: there is no such setting{hint}")
    return problems


def _problems_of(settings_class: type[BaseSettings], overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return the validation errors of a settings class by variable."""
    try:
        settings_class(**overrides)
    except ValidationError as error:
        return {
            variable(str(problem["loc"][0])): problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_url=False, include_input=False)
        }
    return {}


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes set a variable for a service named `pointbook`."""
    return bool(_SERVICE_LINK.fullmatch(name)) or ("://" in value and bool(_LINK_PORT.fullmatch(name)))
