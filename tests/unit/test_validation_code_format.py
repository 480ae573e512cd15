"""The form of one-time codes, and the reading of typed ones."""

from collections import Counter

import pytest

from pointbook_server.programs.model import ValidationSettings
from pointbook_server.validation_codes.code_format import LETTERS_AND_DIGITS, generate_code, normalize_code
from support.examples import examples


def test_code_has_six_digits_by_default() -> None:
    codes = [generate_code(ValidationSettings()) for _ in range(2_000)]

    assert {6} == {len(code) for code in codes}
    assert all(code.isascii() and code.isdigit() for code in codes)
    assert any(code.startswith("0") for code in codes)


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10])
def test_code_has_the_length_and_alphabet_of_the_program(length: int) -> None:
    code = generate_code(ValidationSettings(code_length=length, alphanumeric=True))

    assert length == len(code)
    assert set(code) <= set(LETTERS_AND_DIGITS)


def test_alphabet_has_no_lookalikes() -> None:
    assert len(LETTERS_AND_DIGITS) == len(set(LETTERS_AND_DIGITS)) == 32
    assert not set("01IO") & set(LETTERS_AND_DIGITS)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("364862", "364862"),
        ("007", "007"),
        ("364 862", "364862"),
        (" 3 6 4 8 6 2 ", "364862"),
        ("364-862", "364862"),
        ("364862\r\n", "364862"),
        ("\t364\u00a0862\u3000", "364862"),
        ("364\u2009862\u202f", "364862"),
        ("364\u2028862\u2029", "364862"),
        ("364\u2010862", "364862"),
        ("364\u2014862", "364862"),
        ("364\uff0d862", "364862"),
        ("364\u2212862", "364862"),
        ("364\u30fc862", "364862"),
        ("\uff70364\u301c862", "364862"),
        ("364\u00ad862", "364862"),
        ("\u2066364862\u2069", "364862"),
        ("\ufeff364\u200b862\u200d", "364862"),
        ("3\ufe0f6\ufe0f4862", "364862"),
        ("\uff13\uff16\uff14\uff18\uff16\uff12", "364862"),
        ("\u0663\u0666\u0664\u0668\u0666\u0662", "364862"),
        ("\u06f3\u06f6\u06f4 \u06f8\u06f6\u06f2", "364862"),
        ("\u0969\u096c\u096a\u096e\u096c\u0968", "364862"),
        ("\U0001d7db\U0001d7de4862", "364862"),
        ("abc-234", "ABC234"),
        ("aBcXyZ", "ABCXYZ"),
        ("\uff21\uff42\uff3a\uff5a2", "ABZZ2"),
        ("0o1i", "0O1I"),
        ("364862a", "364862A"),
        ("364.862", "364.862"),
        ("\u0131", "\u0131"),
        ("\u0130", "\u0130"),
        ("\u00df", "\u00df"),
        ("\u017f", "\u017f"),
        ("\u212a", "\u212a"),
        ("\ufb01", "\ufb01"),
        ("\u0251\u0441", "\u0251\u0441"),
        ("\u2460\u00b2", "\u2460\u00b2"),
        ("- \u200b\u2003", ""),
        ("", ""),
    ],
)
def test_typed_code_is_normalized(typed: str, expected: str) -> None:
    assert expected == normalize_code(typed)


@pytest.mark.parametrize("alphanumeric", [False, True])
def test_normalizing_keeps_every_generated_code(*, alphanumeric: bool) -> None:
    for _ in range(200):
        code = generate_code(ValidationSettings(alphanumeric=alphanumeric, code_length=10))
        assert {code} == {normalize_code(typed) for typed in (code, code.lower(), f"{code[:3]}-{code[3:]} ")}


def chi_square_deviation(counts: Counter[str], cells: int) -> float:
    """Return the deviation of counts from a uniform distribution.

    It is measured in standard deviations of their chi-square.
    """
    expected = counts.total() / cells
    missing = expected * (cells - len(counts))
    square = sum((count - expected) ** 2 for count in counts.values()) / expected + missing
    return float((square - (cells - 1)) / (2 * (cells - 1)) ** 0.5)


@pytest.mark.parametrize("alphanumeric", [False, True])
def test_codes_are_uniformly_distributed(*, alphanumeric: bool) -> None:
    validation = ValidationSettings(alphanumeric=alphanumeric)
    codes = [generate_code(validation) for _ in range(examples(1_000_000))]
    characters = "".join(codes)

    for position in range(6):
        assert chi_square_deviation(Counter(characters[position::6]), 32 if alphanumeric else 10) < 8
    if not alphanumeric:
        assert abs(chi_square_deviation(Counter(codes), 10**6)) < 6
