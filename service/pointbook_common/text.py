"""Normalization of pasted text: digits of every script, invisible characters."""

import re
import unicodedata

_INVISIBLE_CATEGORIES = {"Cc", "Cf"}
"""Control and format characters: U+200B to U+200F, U+202A to U+202E, U+FEFF, U+00AD and others."""
_INVISIBLE = {
    *map(chr, range(0xFE00, 0xFE10)),  # Variation selectors
    *map(chr, range(0xE0100, 0xE01F0)),  # Variation selectors supplement
    *map(chr, range(0x180B, 0x1810)),  # Mongolian variation selectors
    *"\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0",  # Combining grapheme joiner, fillers and inherent vowels
}
"""Characters of other categories that are not displayed (Default_Ignorable_Code_Point)."""
_PLUS_SIGNS = "\uff0b\ufe62"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_DASHES = "\u2212\u30fc"
"""The minus sign and the katakana prolonged sound mark, which people type as dashes."""
_PUNCTUATION = str.maketrans("\uff08\uff09\uff0e", "().")


def ascii_digits(text: str) -> str:
    """Return a text with ASCII digits for all Unicode decimal digits, and ASCII plus."""
    return "".join(_ascii_digit(character) for character in text)


def without_invisible(text: str, *, except_for: str = "") -> str:
    """Return a text without invisible characters.

    These are format characters, variation selectors and control characters.
    """
    return "".join(character for character in text if character in except_for or not _is_invisible(character))


def pasted(text: str) -> str:
    """Return a pasted value without invisible characters and surrounding blanks.

    Return an empty text if a line break or another control character separates two values, which must not be joined.
    """
    parts = (without_invisible(part).strip() for part in _CONTROLS.split(text))
    values = [part for part in parts if part]
    return values[0] if len(values) == 1 else ""


def phone_text(text: str) -> str:
    """Return a pasted phone number with ASCII digits, blanks and punctuation."""
    return "".join(_phone_character(character) for character in ascii_digits(pasted(text))).translate(_PUNCTUATION)


def _ascii_digit(character: str) -> str:
    if character in _PLUS_SIGNS:
        return "+"
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def _phone_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Pd" or character in _DASHES:
        return "-"
    return " " if category == "Zs" else character


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE_CATEGORIES or character in _INVISIBLE
