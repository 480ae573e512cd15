"""The texts of messages: templates, placeholders and languages."""

import pytest

from pointbook_server.programs.model import Program, ValidationSettings
from pointbook_server.validation_codes.message_texts import message_text


def write(templates: dict[str, str], language: str = "", program_name: str = "") -> str:
    """Return the message of code 012345 for 100 points."""
    program = Program(
        "m", 1, ("s",), display_name=program_name, validation=ValidationSettings(message_templates=templates)
    )
    return message_text(program, language, "012345", 100)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({}, "012345 is your code to redeem 100 points. It is valid for 5 minutes."),
        ({"": "$code!"}, "012345!"),
        ({"en": "en $code", "zh": "zh $code"}, "en 012345"),
        ({"": "any $code", "en": "en $code"}, "any 012345"),
        ({"zh": "$code"}, "012345 is your code to redeem 100 points. It is valid for 5 minutes."),
        ({"": "$program: ${code} = $points, $minutes min, $$1"}, "Club $code: 012345 = 100, 5 min, $1"),
    ],
)
def test_placeholders_of_a_template_are_replaced_once(templates: dict[str, str], expected: str) -> None:
    assert write(templates, program_name="Club $code") == expected


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("zh-TW", "tw"),
        ("zh_tw", "tw"),
        ("zh-HK", "zh"),
        ("ZH", "zh"),
        ("fr", "any"),
        ("", "any"),
    ],
)
def test_message_is_in_the_customers_language(language: str, expected: str) -> None:
    templates = {"zh-TW": "tw", "zh": "zh", "": "any", "en": "en"}
    assert write(templates, language) == expected


@pytest.mark.parametrize(
    ("keys", "language", "expected"),
    [
        (("zh-Hant", ""), "zh-Hant-TW", "zh-Hant"),
        (("zh-hANT", ""), "ZH-HANT-tw", "zh-hANT"),
        (("zh-Hant", ""), "zh_Hant_TW", "zh-Hant"),
        (("zh_Hant", ""), "zh-Hant-TW", "zh_Hant"),
        (("zh-Hant-TW", "zh-Hant", "zh"), "zh-Hant-TW", "zh-Hant-TW"),
        (("zh-Hant-TW", "zh-Hant", "zh"), "zh-Hant-HK", "zh-Hant"),
        (("zh-Hant-TW", "zh"), "zh-Hant", "zh"),
        (("zh-Hant", ""), "zh-TW", ""),
        (("zh-Hant", ""), "zh", ""),
        (("zh-Hant-TW", ""), "zh-Hant", ""),
        (("zh-TW", ""), "zh-Hant-TW", ""),
        (("zh-Hant-CN-x-private1", "zh-Hant-CN", ""), "zh-Hant-CN-x-private1-private2", "zh-Hant-CN-x-private1"),
        (("zh-Hant-CN-x", "zh-Hant-CN", ""), "zh-Hant-CN-x-private1", "zh-Hant-CN"),
        (("de-DE", "de"), "de-DE-u-co-phonebk", "de-DE"),
        (("de-u-co-phonebk", "de"), "de-u-co-phonebk", "de-u-co-phonebk"),
        (("en-x-a", "en"), "en-x-a", "en-x-a"),
        (("en-x-a", "en"), "en-x-a-b", "en"),
        (("sl", "en"), "sl-rozaj-biske-1994", "sl"),
        (("es-419", "es"), "es-419", "es-419"),
        (("es-419", "es"), "es-MX", "es"),
        (("de", "en"), "fr-CA", "en"),
        (("de", "", "en"), "fr-CA", ""),
        (("de", ""), "", ""),
    ],
)
def test_language_is_looked_up_by_removing_subtags(keys: tuple[str, ...], language: str, expected: str) -> None:
    """By the lookup of RFC 4647.

    Source: https://www.rfc-editor.org/rfc/rfc4647#section-3.4
    """
    templates = {key: f"<{key}> $code" for key in keys}
    assert write(templates, language) == f"<{expected}> 012345"
