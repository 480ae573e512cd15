"""Damage by spreadsheets to files and ids, with cause and remedy.

A rule matches only forms that spreadsheets write and ids do not have. In scientific notation the exponent has a sign or
the mantissa a decimal point, so that `12E5` stays an id; +, - or @ starts a formula only if a function follows.
"""

import codecs
import re
from collections.abc import Sequence

REMEDY = "format the column as text before the values are entered, and export the file again from its source"
SAVE_AS = "save it as CSV UTF-8, separated by commas"
ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""The first bytes of .xlsx and .xls files."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r"sep=(.)", re.IGNORECASE)
_ROUNDED = re.compile(r"[0-9]{15}0{3,}")
_DAMAGES = (
    (
        re.compile(r"[+-]?([0-9]+[.,][0-9]*[eE][+-]?[0-9]+|[0-9]+[eE]\+[0-9]+|[0-9][eE]-[0-9]{2,})"),
        "is in scientific notation, as spreadsheets shorten long numbers, which loses digits",
    ),
    (re.compile(r"['\u2018\u2019].*"), "starts with an apostrophe, which spreadsheets use to mark text"),
    (re.compile(r"=.*|[-+@][A-Za-z.]+\(.*"), "is a formula of a spreadsheet"),
    (re.compile(r"#([A-Z]+(/0)?[!?]|[A-Z]/[A-Z]|NV|#+)|Err:[0-9]{3}"), "is an error value of a spreadsheet"),
    (
        re.compile(r"[+-]?[0-9]+[.,]0+"),
        "is a number with decimals, as spreadsheets write an id that they read as a number",
    ),
    (
        re.compile(r"[+-]?[0-9]{1,3}([,'\u2019 \u00a0\u202f][0-9]{3})+([.,][0-9]+)?"),
        "is a number with thousands separators, as spreadsheets write an id that they read as a number",
    ),
)
"""Forms of ids that a spreadsheet has changed, and the cause of each."""


def id_damage(value: str) -> str | None:
    """Return a spreadsheet's damage to an id, and its remedy; None if there is none."""
    for pattern, cause in _DAMAGES:
        if pattern.fullmatch(value):
            return f"{cause}: {REMEDY}"
    return None


def may_be_rounded(value: str) -> bool:
    """Return whether a number may be rounded by a spreadsheet.

    Spreadsheets store 15 digits; such a number ends in zeros.
    """
    return _ROUNDED.fullmatch(value) is not None


def file_damage(head: bytes) -> str | None:
    """Return a file's damage by its first line, and its remedy; None if there is none."""
    if head.startswith(WORKBOOKS):
        return f"is a spreadsheet workbook: {SAVE_AS}"
    if head.startswith(ENCODINGS) or b"\0" in head[:2]:
        return "is in UTF-16, which spreadsheets call Unicode text: save it as UTF-8"
    if b"\r" in head.rstrip(b"\r\n"):
        return f"has line ends of old Macintoshes: {SAVE_AS}"
    return None


def declared_separator(text: str) -> str | None:
    """Return the separator that a first line such as `sep=;` declares, or None."""
    match = _SEPARATOR_LINE.fullmatch(text)
    return match[1] if match else None


def wrong_separator(header: str, columns: Sequence[str]) -> str | None:
    """Return the separator of a header if it is not a comma, else None."""
    for separator in SEPARATORS:
        names = {name.strip().strip('"') for name in header.split(separator)}
        if separator in header and not names.isdisjoint(columns):
            return separator
    return None
