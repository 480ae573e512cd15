"""Phone numbers: valid forms, the form for sending, and equivalent forms.

Three countries have several forms of one number, and carriers and shops send all of them:

- Argentina (+54): mobile numbers have a 9 after the country code, or 15 after the area code in national form.
  Fixed and mobile numbers share one plan of ten digits, so a number with and without the 9 has one owner.
- Mexico (+52): mobile numbers had a 1 after the country code until 2019, and 01, 044 or 045 in national form.
- Brazil (+55): mobile numbers of eight digits, which begin with 6, 8 or 9, got a leading 9 from 2012 to 2016. Those
  that begin with 7 stay unchanged: trunked radio got no 9, so with a 9 they may be another subscriber's.

Renumberings that need a table of prefixes and dates (such as Ivory Coast 2021 or Benin 2024) are not supported.

Source: docs/reference/customers.md#mobile-numbers
"""

import re
from functools import lru_cache
from typing import NamedTuple

import phonenumbers
from phonenumbers import PhoneNumber, PhoneNumberType

from pointbook_common.text import phone_text

LENGTH_MAX = 32
NUMBERS_CACHED_MAX = 2_048
"""The most numbers whose results are cached: a redemption reads the same number in each of its calls."""
_WRITTEN = re.compile(r"\(?\+? ?\(?[0-9][0-9 ().-]*")
"""The characters of a number: the library would also read letters as digits, and drop extensions."""
_OLD_FORMS = {
    52: (re.compile(r"(?:0?1|04[45])([2-9][0-9]{9})"), r"\1"),
    54: (re.compile(r"90?(?=[0-9]{12}$)([0-9]{2,4}15[0-9]{6,8})|(9)0([1-8][0-9]{9})"), r"\1\2\3"),
    55: (re.compile(r"([1-9]{2})([689][0-9]{7})"), r"\g<1>9\2"),
}
"""By country code: the old national form of a mobile number, and the form that the library reads."""
_OTHER_FORMS = {
    "+52": (re.compile(r"\+52([2-9][0-9]{9})"), r"+521\1"),
    "+54": (re.compile(r"\+54([1-8][0-9]{9})"), r"+549\1"),
    "+55": (re.compile(r"\+55([1-9]{2})9([689][0-9]{7})"), r"+55\1\2"),
}
"""By the start of a key: the other E.164 form of the same number."""
_MOBILE_TYPES = {PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE}


class Phone(NamedTuple):
    """A number in the E.164 form for sending, and the key that all its forms share."""

    e164: str
    key: str


def read(text: str, default_region: str = "") -> Phone | None:
    """Return a phone number, or None if the text is not one.

    Without a default region, the text must have the international form ("+86…").
    """
    written = phone_text(text)
    if len(written) > LENGTH_MAX or not _WRITTEN.fullmatch(written):
        return None
    return _parse(written, default_region)


@lru_cache(NUMBERS_CACHED_MAX)
def _parse(written: str, default_region: str) -> Phone | None:
    """Return a number of at most LENGTH_MAX characters, which bounds the cache."""
    try:
        number = _current(phonenumbers.parse(written, default_region or None))
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    return Phone(_e164(number), _e164(_without_mobile_token(number)))


def forms(key: str) -> list[str]:
    """Return the E.164 forms of the number that has a key."""
    pattern, form = _OTHER_FORMS.get(key[:3], (None, ""))
    match = pattern.fullmatch(key) if pattern is not None else None
    return [key] if match is None else [key, match.expand(form)]


@lru_cache(NUMBERS_CACHED_MAX)
def number_type(e164: str) -> int:
    """Return the library's type of a number.

    The type is FIXED_LINE_OR_MOBILE if it depends on a mobile digit: people omit Argentina's 9, and SMS reach mobile
    phones there without it.
    """
    number = phonenumbers.parse(e164)
    found = phonenumbers.number_type(number)
    token = phonenumbers.country_mobile_token(number.country_code or 0)
    if not token or found != PhoneNumberType.FIXED_LINE:
        return found
    marked = phonenumbers.parse(f"+{number.country_code}{token}{phonenumbers.national_significant_number(number)}")
    is_mobile = phonenumbers.number_type(marked) == PhoneNumberType.MOBILE
    return PhoneNumberType.FIXED_LINE_OR_MOBILE if is_mobile else found


def _current(number: PhoneNumber) -> PhoneNumber:
    """Return a mobile number in its country's current form, others unchanged."""
    pattern, form = _OLD_FORMS.get(number.country_code or 0, (None, ""))
    match = pattern.fullmatch(phonenumbers.national_significant_number(number)) if pattern is not None else None
    if match is None:
        return number
    current = phonenumbers.parse(f"+{number.country_code}{match.expand(form)}")
    return current if phonenumbers.number_type(current) in _MOBILE_TYPES else number


def _without_mobile_token(number: PhoneNumber) -> PhoneNumber:
    """Return a number without its country's digit for mobile numbers."""
    token = phonenumbers.country_mobile_token(number.country_code or 0)
    national = phonenumbers.national_significant_number(number)
    if not token or not national.startswith(token):
        return number
    return PhoneNumber(country_code=number.country_code, national_number=int(national.removeprefix(token)))


def _e164(number: PhoneNumber) -> str:
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
