"""Rules of customers: valid identifiers, and the contacts of an update."""

import re
from collections.abc import Iterable, Mapping

from pointbook_common.text import ascii_digits, pasted
from pointbook_server.customers import emails, phones
from pointbook_server.customers.model import (
    CONTACTS,
    NEVER,
    BuyerState,
    CustomerUpdate,
    Identifier,
    IdentifierKind,
    Stamp,
    UpdateKind,
)
from pointbook_server.ledger.model import AccountKey

PASTED_LENGTH_MAX = 1_000
"""The length of an identifier before invisible characters and blanks are dropped."""
_VALUE = re.compile(r"[!-~]{1,64}")


def read_identifier(kind: IdentifierKind, text: str, default_region: str = "") -> Identifier | None:
    """Return an identifier with its written form, or None if it is invalid.

    Invisible characters and surrounding blanks are dropped, and digits of every script are read, except in e-mail
    addresses, in which they make different mailboxes. Without a default region, a mobile number must have the
    international form ("+86…").
    """
    if len(text) > PASTED_LENGTH_MAX:
        return None
    if kind is IdentifierKind.MOBILE:
        phone = phones.read(text, default_region)
        return None if phone is None else _identifier(kind, phone.key, phone.e164)
    if kind is IdentifierKind.EMAIL:
        address = emails.read(text)
        return None if address is None else _identifier(kind, address.key, address.written)
    value = ascii_digits(pasted(text))
    return Identifier(kind, value) if _VALUE.fullmatch(value) else None


def normalize_identifier(kind: IdentifierKind, text: str, default_region: str = "") -> str | None:
    """Return the value by which an identifier is compared, or None if it is invalid."""
    found = read_identifier(kind, text, default_region)
    return None if found is None else found.value


def _identifier(kind: IdentifierKind, value: str, form: str) -> Identifier:
    return Identifier(kind, value, written="" if form == value else form)


def stated_contacts(update: CustomerUpdate) -> dict[IdentifierKind, str | None]:
    """Return the contacts that an update states, in written form.

    A contact is empty if the update removes it, and None if it is invalid.
    """
    if update.kind is UpdateKind.REDACTED:
        return {}
    if update.kind is UpdateKind.DELETED:
        return dict.fromkeys(CONTACTS, "")
    stated = {IdentifierKind.MOBILE: update.mobile, IdentifierKind.EMAIL: update.email}
    return {kind: text and _written_form(kind, text) for kind, text in stated.items() if text is not None}


def newest_stamps(states: Iterable[BuyerState]) -> dict[IdentifierKind, Stamp]:
    """Return the stamp of the newest update of several buyers that set each contact."""
    found = dict.fromkeys(CONTACTS, NEVER)
    for state in states:
        found = {kind: max(stamp, state.as_of[kind]) for kind, stamp in found.items()}
    return found


def contacts_from_store(buyers: Mapping[AccountKey, BuyerState], store_id: str) -> set[IdentifierKind]:
    """Return the contacts whose newest update came from a store."""
    of_store = newest_stamps(state for buyer, state in buyers.items() if buyer.store_id == store_id)
    return {kind for kind, stamp in newest_stamps(buyers.values()).items() if NEVER != stamp == of_store[kind]}


def _written_form(kind: IdentifierKind, text: str) -> str | None:
    found = read_identifier(kind, text)
    return None if found is None else found.written_form
