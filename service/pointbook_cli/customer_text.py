"""A customer as text: contacts, points, and one line per event, newest first."""

from collections.abc import Iterator
from datetime import tzinfo

from rich.table import Table
from rich.text import Text

from pointbook.v1 import customers_pb2, points_pb2, redemption_pb2
from pointbook_cli.customer_view import CustomerQuery, CustomerView, format_time
from pointbook_cli.terminal import escape_unprintable, print_unpadded, table_console

ACTIONS = {
    redemption_pb2.VALIDATION_ACTION_ISSUE: "code requested",
    redemption_pb2.VALIDATION_ACTION_DELIVER: "code sent",
    redemption_pb2.VALIDATION_ACTION_GUESS: "code guessed",
    redemption_pb2.VALIDATION_ACTION_USE: "code used",
    redemption_pb2.VALIDATION_ACTION_CONFIRM: "missed call",
    redemption_pb2.VALIDATION_ACTION_RESET: "limits reset",
    redemption_pb2.VALIDATION_ACTION_END: "code ended",
}
METHODS = {
    redemption_pb2.REFUSED_METHOD_VALIDATE_REDEMPTION: "validation refused",
    redemption_pb2.REFUSED_METHOD_ISSUE_VALIDATION_CODE: "code refused",
    redemption_pb2.REFUSED_METHOD_REDEEM_POINTS: "redemption refused",
}
CLOSINGS = {
    redemption_pb2.CLOSING_ACTION_SETTLE: "settled by hand",
    redemption_pb2.CLOSING_ACTION_RELEASE: "released",
}
CONTACTS = ("mobile", "email", "external_id", "card_numbers", "card_external_ids", "language")


def print_view(view: CustomerView, query: CustomerQuery, time_zone: tzinfo) -> None:
    """Print a customer in the width of the terminal.

    The width is unlimited if the output is piped and COLUMNS is unset.
    """
    console = table_console()
    for line in (*_identity(view), *_points(view, query, time_zone), *view.notes):
        console.print(Text(escape_unprintable(line)))
    console.print()
    if not view.entries:
        console.print("There are no events in this period.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"time ({time_zone})", overflow="fold")
    table.add_column("event", overflow="fold")
    table.add_column("points", justify="right", overflow="fold")
    table.add_column("details", overflow="fold")
    has_several = len(view.customer.buyers) > 1
    for entry in view.entries:
        event, points, details = _cells(entry, time_zone, has_several=has_several)
        cells = (event, points, ", ".join(filter(None, details)))
        table.add_row(format_time(entry.time, time_zone), *(Text(escape_unprintable(cell)) for cell in cells))
    print_unpadded(console, table)
    if view.is_truncated:
        console.print(f"These are the newest {len(view.entries):,}; --limit shows more.")


def _identity(view: CustomerView) -> Iterator[str]:
    customer = view.customer
    if customer.customer.customer_id:
        yield f"Customer {customer.customer.customer_id}"
    else:
        yield f"Buyer {customer.customer.buyer.buyer_id} of store {customer.customer.buyer.store_id}, no customer"
    if view.record is not None:
        yield from _contacts(view.record)
    else:
        contacts = " ".join(filter(None, (customer.masked_mobile, customer.masked_email)))
        if contacts:
            yield f"  contacts: {contacts}"
    if customer.fraud_blocked:
        yield "  blocked as fraud: cannot redeem"


def _contacts(record: customers_pb2.Customer) -> Iterator[str]:
    for name in CONTACTS:
        value = getattr(record, name)
        text = value if isinstance(value, str) else " ".join(value)
        if text:
            yield f"  {name}: {text}"


def _points(view: CustomerView, query: CustomerQuery, time_zone: tzinfo) -> Iterator[str]:
    for account in view.accounts or ():
        parts = [f"balance {account.points_balance:,}", f"active {account.active_points:,}"]
        more = (("held", account.held_points), ("expired", account.expired_points), ("drift", account.drift))
        parts += [f"{name} {points:,}" for name, points in more if points]
        if account.HasField("next_expiry"):
            expiry = account.next_expiry
            parts.append(f"next to expire {expiry.points:,} at {format_time(expiry.time, time_zone)}")
        yield f"Store {account.store_id}, buyer {account.buyer_id}: {', '.join(parts)}"
    if view.program_points is not None:
        points = view.program_points
        yield (
            f"Program {query.program_id}: balance {points.points_balance:,}, active {points.active_points:,}, "
            f"held {points.held_points:,}, lifetime {points.lifetime_points:,}"
        )


def _cells(entry: redemption_pb2.TimelineEntry, time_zone: tzinfo, *, has_several: bool) -> tuple[str, str, list[str]]:
    """Return an entry's event, points and details."""
    kind = entry.WhichOneof("entry")
    if kind == "points_entry":
        return _points_entry(entry.points_entry, time_zone, has_several=has_several)
    if kind == "redemption":
        return _redemption(entry.redemption, time_zone)
    if kind == "reversal":
        reversal = entry.reversal
        details = [f"of {reversal.redemption_id}", reversal.external_reference_number, _actor(reversal.actor)]
        return "reversed", f"{reversal.points:,}", [*details, reversal.notes]
    if kind == "closing":
        closing = entry.closing
        details = [f"of {closing.redemption_id}", closing.reason, _actor(closing.actor)]
        return CLOSINGS.get(closing.action, "closed"), f"{closing.points:,}", details
    if kind == "validation_event":
        return _validation_event(entry.validation_event, time_zone)
    return _refusal(entry.refusal)


def _points_entry(entry: points_pb2.PointsEntry, time_zone: tzinfo, *, has_several: bool) -> tuple[str, str, list[str]]:
    update = entry.update
    is_increase = update.update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE
    scene = points_pb2.PointsUpdateScene.Name(update.updated_scene).removeprefix("POINTS_UPDATE_SCENE_")
    details = [update.unrecognized_scene or scene, f"balance {entry.balance_after:,}"]
    if has_several:
        details.append(f"store {update.store_id}")
    if update.HasField("points_expiry_time"):
        details.append(f"expire {format_time(update.points_expiry_time, time_zone)}")
    if entry.settled_redemption_id:
        details.append(f"settles {entry.settled_redemption_id}")
    if entry.drift:
        details.append(f"drift {entry.drift:+,}")
    if entry.HasField("void"):
        details.append(f"void: {entry.void.reason}")
    return "earned" if is_increase else "taken", f"{'+' if is_increase else '-'}{update.updated_value:,}", details


def _redemption(redemption: redemption_pb2.Redemption, time_zone: tzinfo) -> tuple[str, str, list[str]]:
    state = redemption_pb2.RedemptionState.Name(redemption.state).removeprefix("REDEMPTION_STATE_")
    details = [
        state,
        f"program {redemption.program_id}",
        redemption.redemption_id,
        redemption.external_reference_number,
        redemption.transaction_number,
        _actor(redemption.actor),
    ]
    if redemption.state == redemption_pb2.REDEMPTION_STATE_PENDING:
        details.insert(1, f"held until {format_time(redemption.settle_by, time_zone)}")
    return "redeemed", f"{redemption.points:,}", [*details, redemption.notes]


def _validation_event(event: redemption_pb2.ValidationEvent, time_zone: tzinfo) -> tuple[str, str, list[str]]:
    channel = redemption_pb2.ValidationType.Name(event.validation_type).removeprefix("VALIDATION_TYPE_")
    details = [
        event.outcome,
        f"{event.count:,} times until {format_time(event.last_time, time_zone)}" if event.count > 1 else "",
        "" if channel == "UNSPECIFIED" else f"by {channel}",
        f"program {event.program_id}" if event.program_id else "",
        event.reason,
        f"challenge {event.challenge_id}" if event.challenge_id else "",
        _actor(event.actor),
    ]
    return ACTIONS.get(event.action, "code"), f"{event.points:,}" if event.points else "", details


def _refusal(refusal: redemption_pb2.Refusal) -> tuple[str, str, list[str]]:
    details = [
        "; ".join(map(_reason, refusal.violations)),
        f"program {refusal.program_id}",
        f"active {refusal.active_points:,}",
        refusal.external_reference_number,
        _actor(refusal.actor),
    ]
    return METHODS.get(refusal.method, "refused"), f"{refusal.points:,}", details


def _reason(status: redemption_pb2.RedemptionStatus) -> str:
    values = ", ".join(f"{name} {value}" for name, value in sorted(status.metadata.items()))
    code = f"{status.code} {status.reason}" if status.code else status.reason
    return f"{code} ({values})" if values else code


def _actor(actor: str) -> str:
    return f"token {actor}" if actor else ""
