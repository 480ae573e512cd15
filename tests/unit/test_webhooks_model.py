"""Entities of the quarantine."""

import pytest

from pointbook_server.webhooks.model import QuarantineReason, Webhook, new_quarantine_id


@pytest.mark.parametrize(
    ("topic", "is_personal"),
    [
        ("customers/create", True),
        ("customers/redact", True),
        ("CUSTOMERS/UPDATE", True),
        ("customers/anything_new", True),
        ("", True),
        ("app_memberSystem_points/challenged", False),
        ("orders/customers/", False),
    ],
)
def test_customer_topics_and_missing_topics_are_personal(topic: str, *, is_personal: bool) -> None:
    webhook = Webhook("m", topic, QuarantineReason.MALFORMED, "", (), b"{}", 1)

    assert webhook.is_personal is is_personal


def test_quarantine_ids_are_unique() -> None:
    assert len({new_quarantine_id() for _ in range(1_000)}) == 1_000
