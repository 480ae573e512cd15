"""The form of one-time codes.

Source: docs/reference/validation-codes.md#form-of-a-code
"""

import secrets
import unicodedata
from string import ascii_lowercase, ascii_uppercase

from pointbook_common.text import ascii_digits, without_invisible
from pointbook_server.programs.model import ValidationSettings

DIGITS = "0123456789"
LETTERS_AND_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Letters and digits without 0, O, 1 and I, which look alike."""
FULL_WIDTH_LETTERS = "".join(map(chr, (*range(0xFF41, 0xFF5B), *range(0xFF21, 0xFF3B))))
TO_UPPER_CASE = str.maketrans(ascii_lowercase + FULL_WIDTH_LETTERS, ascii_uppercase * 3)
OTHER_DASHES = "\u2053\u207b\u208b\u2212\u30fc\uff70"
"""Dashes outside category Pd: swung, superscript, subscript and minus; Japanese keyboards type U+30FC for a dash."""


def generate_code(validation: ValidationSettings) -> str:
    """Return a random code of the program's form.

    Every code is equally likely, leading zeros included.
    """
    alphabet = LETTERS_AND_DIGITS if validation.alphanumeric else DIGITS
    length, code = validation.code_length_or_default, ""
    # One draw from all possible codes, so that they are equally likely by construction.
    number = secrets.randbelow(len(alphabet) ** length)
    for _ in range(length):
        number, index = divmod(number, len(alphabet))
        code += alphabet[index]
    return code


def normalize_code(typed: str) -> str:
    """Return a typed or pasted code in the form in which codes are compared.

    Digits of every script and full-width letters become ASCII, ASCII letters become upper case; blanks, dashes and
    invisible characters are removed. Nothing else changes: a character that no code has, such as a dotless i, or 0, O,
    1 and I among letters, makes a wrong code. The result does not depend on the alphabet, so it needs no challenge.

    Source: docs/reference/validation-codes.md#checking-a-code
    """
    visible = ascii_digits(without_invisible(typed)).translate(TO_UPPER_CASE)
    return "".join(character for character in visible if not _is_separator(character))


def _is_separator(character: str) -> bool:
    """Return whether a character only groups others: a blank or a dash."""
    return character.isspace() or character in OTHER_DASHES or unicodedata.category(character) == "Pd"
