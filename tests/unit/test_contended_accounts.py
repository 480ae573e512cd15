"""The memory of contended accounts."""

from unittest.mock import patch

from pointbook_server.ledger import contended_accounts
from pointbook_server.ledger.contended_accounts import CONTENDED_MS, ContendedAccounts
from pointbook_server.ledger.model import AccountKey

ONE, TWO = AccountKey("store", "one"), AccountKey("store", "two")


def test_account_is_contended_for_a_moment_after_each_conflict() -> None:
    contended = ContendedAccounts()
    assert not contended.has_any("merchant", {ONE}, 0)

    contended.add("merchant", {ONE}, 0)
    assert contended.has_any("merchant", {ONE, TWO}, CONTENDED_MS - 1)
    assert not contended.has_any("merchant", {ONE}, CONTENDED_MS)
    assert not contended.has_any("merchant", {TWO}, 1)
    assert not contended.has_any("other", {ONE}, 1)

    contended.add("merchant", {ONE}, 500)
    assert contended.has_any("merchant", {ONE}, CONTENDED_MS)


def test_memory_is_bounded() -> None:
    contended = ContendedAccounts()
    with patch.object(contended_accounts, "ACCOUNTS_MAX", 1):
        contended.add("merchant", {ONE}, 0)
        contended.add("merchant", {TWO}, 0)

    assert not contended.has_any("merchant", {ONE}, 1)
    assert contended.has_any("merchant", {TWO}, 1)
