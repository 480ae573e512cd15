"""Phone numbers: which are read, how they are sent to, and which forms are one number. Pure.

Three countries have several forms of one number, and carriers and shops send all of them:

- Argentina (+54): mobile numbers have a 9 behind the country code, and 15 behind the area code inside the country.
  Fixed and mobile numbers share one plan of ten digits, so a number with and without the 9 has one owner.
- Mexico (+52): mobile numbers had a 1 behind the country code until 2019, and 01, 044 or 045 inside the country.
- Brazil (+55): mobile numbers of eight digits, which begin with 6, 8 or 9, got a 9 in front from 2012 to 2016. Those
  that begin with 7 are left as they are: trunked radio got no 9, so that with a 9 they may be another subscriber's.

Renumberings that need a table of prefixes and dates (such as Ivory Coast 2021 or Benin 2024) are not supported.
"""

import re
from typing import NamedTuple

import phonenumbers
from phonenumbers import PhoneNumber, PhoneNumberType

from pointbook_common.text import phone_text

LENGTH_MAX = 32
_WRITTEN = re.compile(r"\(?\+? ?\(?[0-9][0-9 ().-]*")
"""What a number may be written with: the library would also read letters as digits, and drop extensions."""
_OLD_FORMS = {
    52: (re.compile(r"(?:0?1|04[45])([2-9][0-9]{9})"), r"\1"),
    54: (re.compile(r"90?(?=[0-9]{12}$)([0-9]{2,4}15[0-9]{6,8})|(9)0([1-8][0-9]{9})"), r"\1\2\3"),
    55: (re.compile(r"([1-9]{2})([689][0-9]{7})"), r"\g<1>9\2"),
}
"""By country code: how a mobile number was or is also written behind it, and what the library reads."""
_OTHER_FORMS = {
    "+52": (re.compile(r"\+52([2-9][0-9]{9})"), r"+521\1"),
    "+54": (re.compile(r"\+54([1-8][0-9]{9})"), r"+549\1"),
    "+55": (re.compile(r"\+55([1-9]{2})9([689][0-9]{7})"), r"+55\1\2"),
}
"""By the start of a key: the other E.164 form of the same number."""
_MOBILE_TYPES = {PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE}


class Phone(NamedTuple):
    """A number in the E.164 form that reaches it, and the key by which all of its forms are compared."""

    e164: str
    key: str


def read(text: str, default_region: str = "") -> Phone | None:
    """Return a phone number, or None if the text is not one.

    Without a default region only the international form ("+86…") is read.
    """
    written = phone_text(text)
    if len(written) > LENGTH_MAX or not _WRITTEN.fullmatch(written):
        return None
    try:
        number = _current(phonenumbers.parse(written, default_region or None))
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    return Phone(_e164(number), _e164(_without_mobile_token(number)))


def forms(key: str) -> list[str]:
    """Return the E.164 forms in which a number may be written whose key this is."""
    pattern, form = _OTHER_FORMS.get(key[:3], (None, ""))
    match = pattern.fullmatch(key) if pattern is not None else None
    return [key] if match is None else [key, match.expand(form)]


def number_type(e164: str) -> int:
    """Return the library's type of a number, FIXED_LINE_OR_MOBILE where it depends on a mobile digit.

    Shops and people leave out Argentina's 9, and SMS reach mobile phones there without it.
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
    """Return a mobile number in its country's current form, and any other one as it is."""
    pattern, form = _OLD_FORMS.get(number.country_code or 0, (None, ""))
    match = pattern.fullmatch(phonenumbers.national_significant_number(number)) if pattern is not None else None
    if match is None:
        return number
    current = phonenumbers.parse(f"+{number.country_code}{match.expand(form)}")
    return current if phonenumbers.number_type(current) in _MOBILE_TYPES else number


def _without_mobile_token(number: PhoneNumber) -> PhoneNumber:
    """Return a number without the digit by which its country marks mobile numbers for calls from abroad."""
    token = phonenumbers.country_mobile_token(number.country_code or 0)
    national = phonenumbers.national_significant_number(number)
    if not token or not national.startswith(token):
        return number
    return PhoneNumber(country_code=number.country_code, national_number=int(national.removeprefix(token)))


def _e164(number: PhoneNumber) -> str:
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
