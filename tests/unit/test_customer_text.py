"""Output of events by `pointbook customer show`."""

from datetime import UTC

import pytest

from pointbook.v1 import redemption_pb2
from pointbook_cli.customer_text import print_view
from pointbook_cli.customer_view import CustomerQuery, CustomerView
from support.clocks import NOW_MS, at


@pytest.mark.parametrize(("count", "shown"), [(1, "LOCKED, by SMS"), (1_200, "LOCKED, 1,200 times until 20")])
def test_a_repeated_event_is_one_line_with_count_and_last_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, shown: str
) -> None:
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
