"""Checks of the settings and of the keys in them."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from pointbook_cli.doctor.findings import Finding, Page, ok, problem, unchecked, warning
from pointbook_cli.settings_checks import settings_problems
from pointbook_common.secret_files import FILE_SUFFIX
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

DISTINCT_BYTES_MIN = 16
"""The fewest different bytes of a random key: 32 random bytes have fewer once in more than 10^12 keys."""
PRINTABLE = range(0x20, 0x7F)
OF_SHIM = {"POINTBOOK_SHOPLINE_SECRETS", "POINTBOOK_SHOPLINE_ENDPOINTS"}
OF_SERVER = {"POINTBOOK_DATABASE_URL", "POINTBOOK_CODE_KEYS", "POINTBOOK_QUARANTINE_KEYS"}

S = TypeVar("S", bound=BaseSettings)


def is_shim_alone(environment: Mapping[str, str]) -> bool:
    """Return whether a shim is set up here, and no database or keys of a server."""
    given = {name.upper().removesuffix(FILE_SUFFIX) for name, value in environment.items() if value}
    return not given.isdisjoint(OF_SHIM) and given.isdisjoint(OF_SERVER)


def check_settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield every problem of the settings of server and shim."""
    required = [] if is_shim_alone(environment) else ["database_url"]
    problems = settings_problems((ServerSettings, ShimSettings), environment, required=required, overrides={})
    for text in problems:
        yield problem("settings", text, "set, correct or remove the variable", Page.SETTINGS)
    if not problems:
        yield ok("settings", "all are valid")


def load_valid(settings_class: type[S]) -> S | None:
    """Load settings with the defaults in place of invalid ones.

    The other checks can then be made. Returns None if the defaults do not suffice.
    """
    try:
        return settings_class()
    except ValidationError as error:
        invalid = {str(each["loc"][0]) for each in error.errors(include_url=False, include_input=False) if each["loc"]}
    fields = settings_class.model_fields
    defaults = {name: fields[name].get_default(call_default_factory=True) for name in invalid if name in fields}
    try:
        return settings_class(**defaults)
    except ValidationError:
        return None


def check_keys(settings: ServerSettings | None) -> Iterator[Finding]:
    """Check that the keys of codes and quarantine are set, random and different."""
    if settings is None:
        yield unchecked("keys", "the settings are wrong")
        return
    code_keys, quarantine_keys = settings.code_key_bytes(), settings.quarantine_key_bytes()
    found = [*_missing(code_keys, quarantine_keys), *_weak(code_keys, quarantine_keys)]
    yield from found or [ok("keys", f"{len(code_keys)} for codes, {len(quarantine_keys)} for the quarantine")]


def _missing(code_keys: Mapping[str, bytes], quarantine_keys: Mapping[str, bytes]) -> Iterator[Finding]:
    if not code_keys:
        text = "POINTBOOK_CODE_KEYS is not set: servers cannot issue codes and cannot redact customers"
        yield warning("keys", text, "set the same keys in all servers", Page.CODE_KEYS)
    if not quarantine_keys:
        text = "POINTBOOK_QUARANTINE_KEYS is not set: customer webhooks that cannot be applied are not stored"
        yield warning("keys", text, "set the same keys in all servers", Page.QUARANTINE_KEYS)


def _weak(code_keys: Mapping[str, bytes], quarantine_keys: Mapping[str, bytes]) -> Iterator[Finding]:
    """Yield the keys that are not random, or that are also another key."""
    names: dict[bytes, str] = {}
    groups = (
        ("POINTBOOK_CODE_KEYS", code_keys, Page.CODE_KEYS),
        ("POINTBOOK_QUARANTINE_KEYS", quarantine_keys, Page.QUARANTINE_KEYS),
    )
    for variable, keys, page in groups:
        for key_id, key in keys.items():
            name = f"{variable}: the key {key_id}"
            if len(set(key)) < DISTINCT_BYTES_MIN or all(byte in PRINTABLE for byte in key):
                remedy = "replace it by the output of `openssl rand -base64 32`"
                yield problem("keys", f"{name} is not random", remedy, page)
            if key in names:
                yield problem("keys", f"{name} is the same as {names[key]}", "use each key for one purpose", page)
            names.setdefault(key, name)
