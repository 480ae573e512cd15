"""E-mail addresses: valid forms, comparison, and the form in SMTP envelopes.

Source: docs/reference/customers.md#email-addresses
"""

import re
import unicodedata
from typing import NamedTuple

from email_validator import EmailNotValidError, ValidatedEmail, validate_email

from pointbook_common.text import pasted, without_invisible

LENGTH_MAX = 254
_LOCAL_PART_LENGTH_MAX = 64
_CARRIER_DOMAINS = {
    *("docomo.ne.jp", "mopera.net", "dwmail.jp"),  # NTT docomo
    *("ezweb.ne.jp", "au.com", "biz.au.com", "ido.ne.jp", "uqmobile.jp"),  # KDDI
    *("softbank.ne.jp", "i.softbank.jp", "vodafone.ne.jp", "disney.ne.jp", "disneymobile.ne.jp"),  # SoftBank
    *(f"jp-{region}.ne.jp" for region in "cdhknqrst"),  # J-PHONE, now SoftBank
    *("ymobile.ne.jp", "ymobile1.ne.jp", "y-mobile.ne.jp", "emnet.ne.jp", "emobile.ne.jp", "emobile-s.ne.jp"),
    *("willcom.com", "wcm.ne.jp", "pdx.ne.jp"),  # Y!mobile, as the line before
    *("rakumail.jp",),  # Rakuten Mobile
}
_CARRIER_SUBDOMAINS = (".ezweb.ne.jp", ".vodafone.ne.jp", ".pdx.ne.jp")
"""These carriers also assigned addresses of subdomains: t.vodafone.ne.jp, biz.ezweb.ne.jp, di.pdx.ne.jp."""
_CARRIER_LOCAL_PART = re.compile(r"(?=.*[^.])[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+")
"""Japanese carriers assigned addresses with dots anywhere until 2009; RFC 5321 allows them in quotes only."""
_JOINERS = "\u200c\u200d"
_JOINED = re.compile(f"[^\x00-\x7f{_JOINERS}][{_JOINERS}]+[^\x00-\x7f{_JOINERS}]")
"""A zero width joiner or non-joiner inside a word: without it, it would be another word."""
_DOT_ATOM = re.compile(r"[^.]+(?:\.[^.]+)*")


class EmailAddress(NamedTuple):
    """An address as written, its key for comparison, and its form in SMTP envelopes."""

    written: str
    key: str
    envelope: str


def read(text: str) -> EmailAddress | None:
    """Return an e-mail address, or None if the text is not one.

    The domain need not exist.

    The local part is compared by NFC and lower case only: casefold and NFKC would merge different mailboxes. The domain
    is compared in its IDNA form. An address with a zero width joiner inside a word is invalid, since it would be
    another address without the joiner.
    """
    address = pasted(text)
    local_part, _, domain = address.rpartition("@")
    if len(address) > LENGTH_MAX or _JOINED.search(without_invisible(text, except_for=_JOINERS)):
        return None
    checked = _validate(address) or _validate_carrier(local_part, domain)
    if checked is None:
        return None
    # Lower-casing can undo NFC.
    lower = unicodedata.normalize("NFC", unicodedata.normalize("NFC", local_part).lower())
    quoted = local_part if _DOT_ATOM.fullmatch(local_part) else f'"{local_part}"'
    return EmailAddress(address, f"{lower}@{checked.domain}", f"{quoted}@{checked.ascii_domain}")


def _validate(address: str) -> ValidatedEmail | None:
    try:
        return validate_email(address, check_deliverability=False)
    except EmailNotValidError:
        return None


def _validate_carrier(local_part: str, domain: str) -> ValidatedEmail | None:
    """Return the validated domain of an address that only a Japanese carrier assigns."""
    if len(local_part) > _LOCAL_PART_LENGTH_MAX or not _CARRIER_LOCAL_PART.fullmatch(local_part):
        return None
    checked = _validate(f"x@{domain}")
    if checked is None:
        return None
    is_carrier = checked.domain in _CARRIER_DOMAINS or checked.domain.endswith(_CARRIER_SUBDOMAINS)
    return checked if is_carrier else None
