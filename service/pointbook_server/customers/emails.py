"""E-mail addresses: which are accepted, how they are compared, and how SMTP writes them. Pure."""

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
    *("willcom.com", "wcm.ne.jp", "pdx.ne.jp"),  # Y!mobile, as those of the line before
    *("rakumail.jp",),  # Rakuten Mobile
}
_CARRIER_SUBDOMAINS = (".ezweb.ne.jp", ".vodafone.ne.jp", ".pdx.ne.jp")
"""Of these carriers, addresses of subdomains too: t.vodafone.ne.jp, biz.ezweb.ne.jp, di.pdx.ne.jp."""
_CARRIER_LOCAL_PART = re.compile(r"(?=.*[^.])[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+")
"""What Japanese carriers gave out until 2009: dots anywhere, which RFC 5321 allows in quotes only."""
_JOINERS = "\u200c\u200d"
_JOINED = re.compile(f"[^\x00-\x7f{_JOINERS}][{_JOINERS}]+[^\x00-\x7f{_JOINERS}]")
"""A zero width joiner or non-joiner inside a word of a script that uses them: without it, it is another word."""
_DOT_ATOM = re.compile(r"[^.]+(?:\.[^.]+)*")


class EmailAddress(NamedTuple):
    """An address as it was written, the key by which it is compared, and as SMTP writes it."""

    written: str
    key: str
    envelope: str


def read(text: str) -> EmailAddress | None:
    """Return an e-mail address, or None if the text is not one. Whether its domain exists is not checked.

    The local part is compared by NFC and lower case only: casefold and NFKC would merge different mailboxes. The domain
    is compared in its IDNA form. An address with a zero width
    joiner inside a word is not read: without the joiner it is another address.
    """
    address = pasted(text)
    local_part, _, domain = address.rpartition("@")
    if len(address) > LENGTH_MAX or _JOINED.search(without_invisible(text, except_for=_JOINERS)):
        return None
    checked = _checked(address) or _checked_at_carrier(local_part, domain)
    if checked is None:
        return None
    # Lower case may leave what NFC writes in another way.
    lower = unicodedata.normalize("NFC", unicodedata.normalize("NFC", local_part).lower())
    quoted = local_part if _DOT_ATOM.fullmatch(local_part) else f'"{local_part}"'
    return EmailAddress(address, f"{lower}@{checked.domain}", f"{quoted}@{checked.ascii_domain}")


def _checked(address: str) -> ValidatedEmail | None:
    try:
        return validate_email(address, check_deliverability=False)
    except EmailNotValidError:
        return None


def _checked_at_carrier(local_part: str, domain: str) -> ValidatedEmail | None:
    """Check the domain of an address that only a Japanese carrier could have given out."""
    if len(local_part) > _LOCAL_PART_LENGTH_MAX or not _CARRIER_LOCAL_PART.fullmatch(local_part):
        return None
    checked = _checked(f"x@{domain}")
    if checked is None:
        return None
    is_carrier = checked.domain in _CARRIER_DOMAINS or checked.domain.endswith(_CARRIER_SUBDOMAINS)
    return checked if is_carrier else None
