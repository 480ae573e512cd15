"""What spreadsheets do to files and ids: each finding names the cause and the cure.

A rule refuses only what a spreadsheet writes and no id looks like. Scientific notation has a sign in its exponent or a
decimal mantissa there, so that `12E5` stays an id; a plus, minus or @ begins a formula only where a function follows.
"""

import codecs
import re
from collections.abc import Sequence

CURE = "format the column as text before the values are entered, and export the file anew from its source"
SAVE_AS = "save it as CSV UTF-8, separated by commas"
ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""How .xlsx and .xls begin."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r"sep=(.)", re.IGNORECASE)
_ROUNDED = re.compile(r"[0-9]{15}0{3,}")
_DAMAGES = (
    (
        re.compile(r"[+-]?([0-9]+[.,][0-9]*[eE][+-]?[0-9]+|[0-9]+[eE]\+[0-9]+|[0-9][eE]-[0-9]{2,})"),
        "is in scientific notation, as spreadsheets shorten long numbers, which loses digits",
    ),
    (re.compile(r"['\u2018\u2019].*"), "begins with the apostrophe by which spreadsheets mark text"),
    (re.compile(r"=.*|[-+@][A-Za-z.]+\(.*"), "is a formula of a spreadsheet"),
    (re.compile(r"#([A-Z]+(/0)?[!?]|[A-Z]/[A-Z]|NV|#+)|Err:[0-9]{3}"), "is what spreadsheets show instead of a value"),
    (re.compile(r"[+-]?[0-9]+[.,]0+"), "is a number with decimals, as spreadsheets write an id that they take for one"),
    (
        re.compile(r"[+-]?[0-9]{1,3}([,'\u2019 \u00a0\u202f][0-9]{3})+([.,][0-9]+)?"),
        "is a number with thousands separators, as spreadsheets write an id that they take for one",
    ),
)
"""What an id looks like that a spreadsheet has changed, and what it is then."""


def damage_of(value: str) -> str | None:
    """Return what a spreadsheet did to an id and how to mend it; None where nothing says that it did."""
    for form, cause in _DAMAGES:
        if form.fullmatch(value):
            return f"{cause}: {CURE}"
    return None


def may_be_rounded(value: str) -> bool:
    """Return whether a long number ends in zeros as if a spreadsheet, which keeps 15 digits, had rounded it."""
    return _ROUNDED.fullmatch(value) is not None


def file_damage_of(head: bytes) -> str | None:
    """Return why the first line of a file cannot be read and how to mend it; None where it can be."""
    if head.startswith(WORKBOOKS):
        return f"is a spreadsheet's workbook: {SAVE_AS}"
    if head.startswith(ENCODINGS) or b"\0" in head[:2]:
        return "is in UTF-16, which spreadsheets call Unicode text: save it in UTF-8"
    if b"\r" in head.rstrip(b"\r\n"):
        return f"ends its lines as old Macintoshes did: {SAVE_AS}"
    return None


def separator_of(text: str) -> str | None:
    """Return the separator that a first line such as `sep=;` announces; None where it is no such line."""
    form = _SEPARATOR_LINE.fullmatch(text)
    return form[1] if form else None


def wrong_separator_of(header: str, columns: Sequence[str]) -> str | None:
    """Return the separator other than a comma by which a header names columns; None where there is none."""
    for separator in SEPARATORS:
        names = {name.strip().strip('"') for name in header.split(separator)}
        if separator in header and not names.isdisjoint(columns):
            return separator
    return None
