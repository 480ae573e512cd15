"""How `pointbook customer show` prints events."""

from datetime import UTC

import pytest

from pointbook.v1 import redemption_pb2
from pointbook_cli.customer import CustomerQuery, CustomerView
from pointbook_cli.customer_text import print_view
from support.harness import NOW_MS, at


@pytest.mark.parametrize(("count", "shown"), [(1, "LOCKED, by SMS"), (1_200, "LOCKED, 1,200 times until 20")])
def test_a_repeated_event_is_one_line_with_its_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, shown: str
) -> None:
    """And with its last time, since its line stands at the first."""
    monkeypatch.delenv("COLUMNS", raising=False)
    event = redemption_pb2.ValidationEvent(
        time=at(NOW_MS),
        action=redemption_pb2.VALIDATION_ACTION_GUESS,
        outcome="LOCKED",
        validation_type=redemption_pb2.VALIDATION_TYPE_SMS,
        count=count,
        last_time=at(NOW_MS + 60_000),
    )
    entry = redemption_pb2.TimelineEntry(time=at(NOW_MS), validation_event=event)
    view = CustomerView(redemption_pb2.TimelineCustomer(), [entry], is_truncated=False, accounts=None)
    print_view(view, CustomerQuery("m", "mobile", "+86"), UTC)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "LOCKED" in line]
    assert shown in line
