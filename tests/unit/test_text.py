"""Digits of every script, and invisible characters."""

import sys
import unicodedata

import pytest

from pointbook_common.text import ascii_digits, pasted, phone_text, without_invisible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123", "123"),
        ("\uff11\uff12\uff13", "123"),  # Full-width
        ("\u0660\u0661\u0669", "019"),  # Arabic-Indic
        ("\u06f0\u06f1\u06f9", "019"),  # Persian
        ("\u0966\u0967\u096f", "019"),  # Devanagari
        ("\U0001d7d8\U0001d7e1", "09"),  # Double-struck
        ("\uff0b\uff18\uff16", "+86"),
        ("\ufe6286", "+86"),
        ("\u00b2\u2460\u216b", "\u00b2\u2460\u216b"),  # Superscript, circled and Roman numerals are not digits
        ("Ab\u00df", "Ab\u00df"),
        ("", ""),
    ],
)
def test_decimal_digits_and_plus_signs_of_every_script_become_ascii(text: str, expected: str) -> None:
    assert ascii_digits(text) == expected


def test_every_decimal_digit_and_nothing_else_becomes_an_ascii_digit() -> None:
    """Digits are the characters of Unicode category Nd."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    converted = ascii_digits(characters)
    digits = set("0123456789")

    changed = [before for before, after in zip(characters, converted, strict=True) if after in digits]

    assert changed == [character for character in characters if unicodedata.category(character) == "Nd"]


@pytest.mark.parametrize(
    "invisible",
    [
        *"\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2069",
        *"\ufeff\u00ad\u061c\u180e\u180b\u034f\ufe0f\ufe00\u3164\uffa0\x00\x08\t\n\r\x7f\x85",
        "\U000e0100",
        "\U000e0001",
    ],
)
def test_invisible_characters_are_dropped(invisible: str) -> None:
    assert without_invisible(f"{invisible}a{invisible}b{invisible}") == "ab"


@pytest.mark.parametrize("text", ["a b", "a\u00a0b", "e\u0301", "\u00df", "\u65e5\u672c", "-", "\U0001f600", ""])
def test_visible_characters_and_spaces_are_kept(text: str) -> None:
    """Including combining accents."""
    assert without_invisible(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada", "ada"),
        (" \u00a0ada\u3000\r\n", "ada"),
        ("\u202a\n ada \u202c\n", "ada"),
        ("a\u200bd\u00ada", "ada"),
        ("a da", "a da"),
        ("ada\nbob", ""),
        ("ada\tbob", ""),
        ("ada\u2028bob", ""),
        ("ada\x00bob", ""),
        ("\u200b\n", ""),
    ],
)
def test_pasted_value_is_its_visible_part(text: str, expected: str) -> None:
    """Spaces inside are kept; text with control characters inside is rejected."""
    assert pasted(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\uff0b\uff18\uff16\u3000\uff081\uff09\uff0e2", "+86 (1).2"),
        ("1\u20102\u20133\u22124\u30fc5\uff0d6", "1-2-3-4-5-6"),
        ("\u2066+86\u00a01\u2009\u20692", "+86 1 2"),
        ("tel:1;ext=2", "tel:1;ext=2"),
    ],
)
def test_punctuation_and_digits_of_a_phone_number_become_ascii(text: str, expected: str) -> None:
    """Other characters are kept, for validation to reject them."""
    assert phone_text(text) == expected
