"""Phone numbers as people, shops and carriers write them."""

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from pointbook_server.customers import phones

SHARED_PLANS = {"AR", "BR", "MX"}
NUMBER = "+8613800000000"


@pytest.mark.parametrize(
    "written",
    [
        "\u202a+8613800000000\u202c",
        "\u200e+86\u200b138\ufeff0000\u00ad0000\u2060",
        "\u2066\u2068+86 138 0000 0000\u2069\u2069",
        "+86\u00a0138\u202f0000\u20090000",
        "+86\u3000138\u20020000\u20070000",
        "\uff0b\uff18\uff16\uff11\uff13\uff18\uff10\uff10\uff10\uff10\uff10\uff10\uff10\uff10",
        "\ufe6286\uff0d138\uff0d0000\uff0d0000",
        "+86\uff08138\uff0900000000",
        "+86\u2010138\u20110000\u20130000",
        "+86\u2014138\u22120000\u30fc0000",
        "+\u0668\u0666\u0661\u0663\u0668\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660",
        "+\u06f8\u06f6\u06f1\u06f3\u06f8\u06f0\u06f0\u06f0\u06f0\u06f0\u06f0\u06f0\u06f0",
        "+\u096e\u096c\u0967\u0969\u096e\u0966\u0966\u0966\u0966\u0966\u0966\u0966\u0966",
        "(+86) 138 0000 0000",
        "+ 86 138.0000\uff0e0000",
        " \t+8613800000000\r\n",
        "\u202a\n+8613800000000\n\u202c\ufe0f",
        "+8613800000000" + " " * 30 + "\u200b" * 30,
    ],
)
def test_invisible_characters_and_digits_of_every_script_are_read(written: str) -> None:
    assert phones.read(written) == (NUMBER, NUMBER)


@pytest.mark.parametrize(
    "written",
    [
        "+86138\n0000\n0000",
        "+8613800000000\n+8613900000000",
        "+86\u2460\u2462\u246780000000",
        "+8613800000000 ext. 5",
        "+8613800000000#5",
        "\u200b",
        " ",
        "++8613800000000",
        "+86/13800000000",
        "+86138000000001",
        "+" + "1" * 40,
    ],
)
def test_other_texts_are_not_numbers(written: str) -> None:
    assert phones.read(written) is None


@pytest.mark.parametrize(
    ("written", "region", "e164", "key"),
    [
        # Argentina: the 9 of mobile numbers, and the 15 after the area code of two, three and four digits.
        ("+5491123456789", "", "+5491123456789", "+541123456789"),
        ("+54 9 11 2345-6789", "", "+5491123456789", "+541123456789"),
        ("+541123456789", "", "+541123456789", "+541123456789"),
        ("+54 11 15 2345-6789", "", "+5491123456789", "+541123456789"),
        ("+54 9 11 15 2345-6789", "", "+5491123456789", "+541123456789"),
        ("+54 (011) 15-2345-6789", "", "+5491123456789", "+541123456789"),
        ("011 15-2345-6789", "AR", "+5491123456789", "+541123456789"),
        ("11 2345-6789", "AR", "+541123456789", "+541123456789"),
        ("+54 9 011 2345-6789", "", "+5491123456789", "+541123456789"),
        ("+54 9 (0351) 512-3456", "", "+5493515123456", "+543515123456"),
        ("+5493515123456", "", "+5493515123456", "+543515123456"),
        ("0351 15-512-3456", "AR", "+5493515123456", "+543515123456"),
        ("+5492982423456", "", "+5492982423456", "+542982423456"),
        ("02982 15-42-3456", "AR", "+5492982423456", "+542982423456"),
        ("+546751234567", "", "+546751234567", "+546751234567"),  # A mobile number without a 9.
        ("+548001234567", "", "+548001234567", "+548001234567"),
        # Mexico: 1 until 2019, and 01, 044 and 045 in national form.
        ("+5215512345678", "", "+525512345678", "+525512345678"),
        ("+52 1 55 1234 5678", "", "+525512345678", "+525512345678"),
        ("+525512345678", "", "+525512345678", "+525512345678"),
        ("+52 044 81 1234 5678", "", "+528112345678", "+528112345678"),
        ("+52 01 222 123 4567", "", "+522221234567", "+522221234567"),
        ("045 55 1234 5678", "MX", "+525512345678", "+525512345678"),
        ("1 55 1234 5678", "MX", "+525512345678", "+525512345678"),
        ("+528001234567", "", "+528001234567", "+528001234567"),
        # Brazil: the ninth digit of mobile numbers, which had eight digits and began with 6, 8 or 9.
        ("+5511987654321", "", "+5511987654321", "+5511987654321"),
        ("+551187654321", "", "+5511987654321", "+5511987654321"),
        ("+55 (51) 9765-4321", "", "+5551997654321", "+5551997654321"),
        ("+55 61 6765-4321", "", "+5561967654321", "+5561967654321"),
        ("+55 11 7765-4321", "", "+551177654321", "+551177654321"),
        ("+5511977654321", "", "+5511977654321", "+5511977654321"),
        ("(11) 8765-4321", "BR", "+5511987654321", "+5511987654321"),
        ("0 15 11 8765-4321", "BR", "+5511987654321", "+5511987654321"),
        ("+551133334444", "", "+551133334444", "+551133334444"),
        ("+551123456789", "", "+551123456789", "+551123456789"),
        ("+555156789012", "", "+555156789012", "+555156789012"),
        ("+5511933334444", "", "+5511933334444", "+5511933334444"),
        ("+558001234567", "", "+558001234567", "+558001234567"),
    ],
)
def test_forms_of_one_number_have_one_key(written: str, region: str, e164: str, key: str) -> None:
    """The form for sending has Argentina's 9, Brazil's ninth digit, and no Mexican 1."""
    assert phones.read(written, region) == (e164, key)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("+551133334444", "+5511933334444"),  # A fixed-line number, and a mobile one with a 9 of its own.
        ("+551123456789", "+5511923456789"),
        *(
            (f"+5511{start}0{number}", f"+55119{start}0{number}")
            for start in range(70, 80)
            for number in (12345, 99999)
        ),
        ("+5511987654321", "+5521987654321"),
        ("+541123456789", "+541123456780"),
        ("+5215512345678", "+5218112345678"),
        ("+525512345678", "+5511987654321"),
    ],
)
def test_numbers_of_different_subscribers_have_different_keys(one: str, other: str) -> None:
    first, second = phones.read(one), phones.read(other)
    assert first is not None
    assert second is not None
    assert first.key != second.key


@pytest.mark.parametrize(
    "written", ["+521 800 123 4567", "+521 200 123 4567", "+549 800 123 4567", "+55 11 1234-5678", "+55 10 8765-4321"]
)
def test_a_mobile_digit_before_a_number_that_is_not_mobile_is_invalid(written: str) -> None:
    assert phones.read(written) is None


def test_numbers_of_other_regions_have_one_form() -> None:
    types = [PhoneNumberType.FIXED_LINE, PhoneNumberType.MOBILE, PhoneNumberType.TOLL_FREE, PhoneNumberType.VOIP]
    examples = [
        phonenumbers.format_number(number, PhoneNumberFormat.E164)
        for region in sorted(phonenumbers.SUPPORTED_REGIONS - SHARED_PLANS)
        for number in (phonenumbers.example_number_for_type(region, each) for each in types)
        if number is not None and phonenumbers.is_valid_number(number)
    ]

    assert len(examples) > 400
    assert [phones.read(example) for example in examples] == [(example, example) for example in examples]
    assert [phones.forms(example) for example in examples] == [[example] for example in examples]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("+5491123456789", PhoneNumberType.MOBILE),
        ("+541123456789", PhoneNumberType.FIXED_LINE_OR_MOBILE),
        ("+543515123456", PhoneNumberType.FIXED_LINE_OR_MOBILE),
        ("+548001234567", PhoneNumberType.TOLL_FREE),
        ("+525512345678", PhoneNumberType.FIXED_LINE_OR_MOBILE),
        ("+5511987654321", PhoneNumberType.MOBILE),
        ("+551133334444", PhoneNumberType.FIXED_LINE),
        ("+861062770334", PhoneNumberType.FIXED_LINE),
        ("+12025550123", PhoneNumberType.FIXED_LINE_OR_MOBILE),
    ],
)
def test_an_argentine_number_without_its_nine_may_be_mobile(number: str, expected: int) -> None:
    assert phones.number_type(number) == expected


@given(st.text(max_size=40), st.sampled_from(["", "AR", "BR", "CN", "DE", "MX"]))
def test_reading_is_idempotent_and_never_fails(text: str, region: str) -> None:
    found = phones.read(text, region)
    if found is not None:
        assert phones.read(found.e164) == found
        assert phones.read(found.key) == (found.key, found.key)


@given(st.sampled_from(["+5411", "+54351", "+5255", "+5281", "+5511", "+5551"]), st.data())
def test_every_form_of_a_generated_number_has_one_key(start: str, data: st.DataObject) -> None:
    digits = 10 - len(start) + 3
    rest = data.draw(st.text("0123456789", min_size=digits, max_size=digits))
    found = phones.read(start + rest)
    if found is None:
        return
    keys = {read.key for form in phones.forms(found.key) if (read := phones.read(form)) is not None}
    assert keys == {found.key}
    assert found.e164 in phones.forms(found.key)


def test_long_texts_are_not_cached() -> None:
    """A sender could otherwise fill the memory with texts that are not numbers."""
    size = phones._parse.cache_info().currsize

    assert phones.read("+" + "1" * 100_000) is None
    assert phones.read("x" * 100_000) is None

    assert phones._parse.cache_info().currsize == size
