"""Checks of stored tokens, webhooks, events, redemptions and erasures."""

from collections.abc import Iterator, Sequence

from pointbook_cli.doctor.findings import Finding, Page, ok, problem, some_of, warning
from pointbook_cli.terminal import count_of
from pointbook_common.durations import DAY_MS, HOUR_MS, MINUTE_MS
from pointbook_server.access.model import Token
from pointbook_server.access.transactions import read_tokens
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Connection
from pointbook_server.ledger.report import read_drift
from pointbook_server.programs.erasures.transactions import count_open
from pointbook_server.programs.webhook_times import read_newest
from pointbook_server.redemption.report import read_overdue
from pointbook_server.settings import ServerSettings
from pointbook_server.webhooks.model import SHARED
from pointbook_server.webhooks.quota import limits_of
from pointbook_server.webhooks.report import QuarantineUsage, read_usage, read_waiting

TOKEN_EXPIRES_SOON_MS = 14 * DAY_MS
RECENT_USE_MS = 7 * DAY_MS
"""A token that was used within this time has a caller who may use it again."""
UNUSED_AFTER_MS = 30 * DAY_MS
OVERDUE_AFTER_MS = 10 * MINUTE_MS
"""Servers release overdue holds within minutes."""
QUARANTINE_SHARE_MAX = 0.8


async def check_tokens(connection: Connection) -> list[Finding]:
    """Check the tokens of callers.

    Findings have their ids only, because a token's name may be that of a person.
    """
    tokens = [token for token in await read_tokens(connection) if token.revoked_at_ms is None]
    return [*token_findings(tokens, system_clock())]


def token_findings(tokens: Sequence[Token], now_ms: int) -> Iterator[Finding]:
    """Yield the findings about tokens that are not revoked, at a time."""
    valid = [token for token in tokens if token.expires_at_ms is None or token.expires_at_ms > now_ms]
    if not valid:
        text = "no token is valid: a server that requires tokens refuses every call"
        yield warning("tokens", text, "create one with `pointbook token create`", Page.ACCESS)
    soon = [token for token in valid if token.expires_at_ms and token.expires_at_ms <= now_ms + TOKEN_EXPIRES_SOON_MS]
    # A rotated token has a successor, which its caller uses by now or will have to.
    late = [token for token in soon if token.rotated_to is None or _is_recent(token, now_ms, DAY_MS)]
    expired = [token for token in tokens if token not in valid and token.rotated_to is None]
    lost = [token for token in expired if _is_recent(token, now_ms, RECENT_USE_MS)]
    unused = [token for token in valid if not token.last_used_at_ms and token.created_at_ms <= now_ms - UNUSED_AFTER_MS]
    if lost:
        text = f"{count_of(len(lost), 'token', 'tokens')} in use until this week expired: {_ids(lost)}"
        yield problem("tokens", text, "give the callers new ones with `pointbook token create`", Page.ACCESS)
    if late:
        text = f"{count_of(len(late), 'token expires', 'tokens expire')} within 14 days: {_ids(late)}"
        yield warning(
            "tokens", text, "replace each with `pointbook token rotate`, and give it to its caller", Page.ACCESS
        )
    if unused:
        text = f"{count_of(len(unused), 'token was', 'tokens were')} never used in 30 days: {_ids(unused)}"
        yield warning("tokens", text, "revoke those that are not needed with `pointbook token revoke`", Page.ACCESS)
    if valid and not (lost or late or unused):
        yield ok("tokens", f"{len(valid):,} valid")


def _is_recent(token: Token, now_ms: int, within_ms: int) -> bool:
    return token.last_used_at_ms is not None and token.last_used_at_ms > now_ms - within_ms


def _ids(tokens: Sequence[Token]) -> str:
    return some_of([token.token_id for token in tokens])


async def check_quarantine(connection: Connection, settings: ServerSettings | None) -> list[Finding]:
    """Check that no webhook waits in quarantine, and that there is space for more."""
    waiting, usage = await read_waiting(connection), await read_usage(connection)
    found = []
    if waiting:
        reasons = ", ".join(f"{each.webhooks:,} {each.reason}" for each in waiting)
        age = _age(system_clock() - min(each.oldest_at_ms for each in waiting))
        text = f"{reasons}; the oldest waits for {age}"
        remedy = "list them with `pointbook quarantine list`, remove the cause, then replay them"
        found.append(warning("quarantine", text, remedy, Page.QUARANTINE))
    if settings is not None:
        found += _full_quarantines(usage, settings)
    stored = sum(each.webhooks for each in usage)
    return found or [ok("quarantine", f"none waits, {stored:,} replayed" if stored else "empty")]


def _full_quarantines(usage: Sequence[QuarantineUsage], settings: ServerSettings) -> Iterator[Finding]:
    """Return the limits of which at least QUARANTINE_SHARE_MAX is used."""
    total = QuarantineUsage("", sum(each.webhooks for each in usage), sum(each.bytes for each in usage))
    shared = [each for each in usage if each.owner_id == SHARED]
    own = [each for each in usage if each.owner_id != SHARED]
    limits = limits_of(settings)
    for usages, limit, place in (
        ([total], limits.total, "for all merchants"),
        (shared, limits.shared, "that merchants share"),
        (own, limits.merchant, "of merchant {owner_id}"),
    ):
        for each in usages:
            share = limit.used_ratio(each.webhooks, each.bytes)
            if share >= QUARANTINE_SHARE_MAX:
                finding = problem if share >= 1 else warning
                text = f"{share:.0%} of the space {place.format(owner_id=each.owner_id)} is used"
                yield finding("quarantine", text, "drop webhooks, replayed ones too", Page.QUARANTINE_LIMITS)


async def check_stores(connection: Connection, silent_hours: float) -> list[Finding]:
    """Check that a webhook of each store was accepted lately."""
    stores = await read_newest(connection)
    oldest_ms = system_clock() - silent_hours * HOUR_MS
    silent = [store for store in stores if (store.last_webhook_at_ms or store.updated_at_ms) < oldest_ms]
    if not silent:
        return [ok("stores", f"{len(stores):,} registered, none is silent")]
    names = some_of([f"{store.merchant_id}/{store.store_id}" for store in silent])
    text = f"no webhook for {silent_hours:g} h from {count_of(len(silent), 'store', 'stores')}: {names}"
    remedy = "compare the app secret, and look at the webhook's subscription in SHOPLINE"
    return [warning("stores", text, remedy, Page.SYMPTOMS)]


async def check_drift(connection: Connection) -> list[Finding]:
    """Check that no account drifts."""
    drift = await read_drift(connection)
    if not drift.accounts:
        return [ok("drift", "no account drifts")]
    accounts = count_of(drift.accounts, "account drifts", "accounts drift")
    text = f"{accounts}, by {drift.points:+,} points in total, of {count_of(drift.merchants, 'merchant', 'merchants')}"
    return [warning("drift", text, "list them with ListDriftingAccounts, and import the lost events", Page.DRIFT)]


async def check_holds(connection: Connection) -> list[Finding]:
    """Check that servers release the holds that SHOPLINE has not booked in time."""
    now_ms = system_clock()
    overdue = await read_overdue(connection, now_ms)
    if overdue.oldest_at_ms is None or overdue.oldest_at_ms > now_ms - OVERDUE_AFTER_MS:
        return [ok("holds", "none is overdue")]
    redemptions = count_of(overdue.redemptions, "redemption holds", "redemptions hold")
    text = f"{redemptions} {overdue.points:,} overdue points, the oldest for {_age(now_ms - overdue.oldest_at_ms)}"
    remedy = "look for failed maintenance jobs and for a wrong clock in the servers' logs"
    return [problem("holds", text, remedy, Page.SETTLEMENT)]


async def check_erasures(connection: Connection) -> list[Finding]:
    """Check that no request to erase a store is overdue."""
    open_count, overdue = await count_open(connection, system_clock())
    if overdue:
        text = f"{count_of(overdue, 'overdue request', 'overdue requests')} to erase a store"
        remedy = "list them with `pointbook store erasures`, then `pointbook store erase`"
        return [problem("erasures", text, remedy, Page.ERASURES)]
    return [ok("erasures", f"{open_count:,} open, none is overdue")]


def _age(age_ms: float) -> str:
    """Return a duration in its largest unit."""
    for unit_ms, one, many in ((DAY_MS, "day", "days"), (HOUR_MS, "hour", "hours"), (MINUTE_MS, "minute", "minutes")):
        if age_ms >= unit_ms:
            return count_of(int(age_ms // unit_ms), one, many)
    return "less than a minute"
