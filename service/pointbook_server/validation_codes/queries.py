"""SQL of one-time codes, and the codecs of its rows.

Transactions lock live challenges first, sorted by customer, and then counters, sorted by name.
"""

import json
from typing import Any

from sqlalchemy import text

from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import Row, Statement
from pointbook_server.db.row_types import RowTypes, rows_of
from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.model import Challenge, ChallengeState, Delivery, Purpose
from pointbook_server.validation_codes.rate_limits import SlidingWindowCounter

CHALLENGE_COLUMNS = {
    "challenge_id": "text",
    "customer": "text",
    "program_id": "bigint",
    "points": "bigint",
    "group_redemption": "boolean",
    "group_id": "text",
    "channel": "text",
    "destination_digest": "bytea",
    "called_number": "text",
    "key_id": "text",
    "code_digest": "bytea",
    "attempts": "integer",
    "unnamed_attempts": "integer",
    "state": "text",
    "delivery": "text",
    "sent_at_ms": "bigint",
    "resend_at_ms": "bigint",
    "expires_at_ms": "bigint",
    "confirmed_at_ms": "bigint",
}
CHANGING_COLUMNS = (
    "key_id",
    "destination_digest",
    "code_digest",
    "attempts",
    "unnamed_attempts",
    "state",
    "delivery",
    "sent_at_ms",
    "resend_at_ms",
    "expires_at_ms",
)
AUDIT_COLUMNS = {
    "audit_id": "text",
    "action": "text",
    "outcome": "text",
    "customer": "text",
    "challenge_id": "text",
    "program_id": "bigint",
    "points": "bigint",
    "channel": "text",
    "actor": "text",
    "reason": "text",
    "repeat_key": "text",
    "event_count": "bigint",
}
COUNTER_COLUMNS = {"subject": "text", "counts": "jsonb", "revision": "bigint"}
ROW_TYPES: RowTypes = {
    "validation_challenge_row": CHALLENGE_COLUMNS,
    "validation_counter_row": COUNTER_COLUMNS,
    "validation_audit_row": AUDIT_COLUMNS,
}
CHALLENGE = ", ".join(("merchant_id", *CHALLENGE_COLUMNS))


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


# The state is a literal, because a plan for any state could not use the index of live challenges. OFFSET keeps the
# look-up of each customer from being merged into a join. A customer's two challenges are locked in index order.
LOCK_LIVE = _statement(f"""
    SELECT c.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT {CHALLENGE} FROM validation_challenges
        WHERE customer = v.customer AND merchant_id = :merchant_id AND state = 'LIVE' OFFSET 0 FOR UPDATE
    ) AS c
""")
READ_LIVE = _statement(f"""
    SELECT {CHALLENGE} FROM validation_challenges
    WHERE customer = :customer AND merchant_id = :merchant_id AND state = 'LIVE'
        AND (channel = 'MISSED_CALL') = CAST(:is_call AS boolean)
""")
LOCK_COUNTERS = _statement("""
    SELECT t.* FROM unnest(CAST(:names AS text[])) AS v (subject) CROSS JOIN LATERAL (
        SELECT subject, counts, revision FROM validation_tallies
        WHERE subject = v.subject AND merchant_id = :merchant_id OFFSET 0 FOR UPDATE
    ) AS t
""")
# All rows exist and are locked, so each INSERT becomes an update.
_UPDATE_CHALLENGES = f"""
    INSERT INTO validation_challenges ({CHALLENGE})
    SELECT :merchant_id, {", ".join(CHALLENGE_COLUMNS)} FROM {rows_of("validation_challenge_row")}
    ORDER BY challenge_id
    ON CONFLICT (challenge_id, merchant_id) DO UPDATE
    SET {", ".join(f"{name} = excluded.{name}" for name in CHANGING_COLUMNS)}
    RETURNING 1
"""
# In the order of customers: each may wait for a challenge that another call has inserted.
_INSERT_CHALLENGES = f"""
    INSERT INTO validation_challenges ({CHALLENGE})
    SELECT :merchant_id, {", ".join(CHALLENGE_COLUMNS)} FROM {rows_of("validation_challenge_row")}
    ORDER BY customer
    ON CONFLICT DO NOTHING RETURNING 1
"""
# If two transactions start a counter at once, the second one writes no row and runs again.
_WRITE_COUNTERS = f"""
    INSERT INTO validation_tallies AS t (subject, merchant_id, counts, revision, updated_at_ms)
    SELECT subject, :merchant_id, counts, revision, CAST(:now_ms AS bigint) FROM {rows_of("validation_counter_row")}
    ORDER BY subject
    ON CONFLICT (subject, merchant_id) DO UPDATE
    SET counts = excluded.counts, revision = excluded.revision, updated_at_ms = excluded.updated_at_ms
    WHERE t.revision = excluded.revision - 1
    RETURNING 1
"""
# In key order, because existing rows are locked.
_INSERT_AUDIT = f"""
    INSERT INTO validation_audit AS a (merchant_id, at_ms, {", ".join(AUDIT_COLUMNS)})
    SELECT :merchant_id, CAST(:now_ms AS bigint), {", ".join(AUDIT_COLUMNS)} FROM {rows_of("validation_audit_row")}
    ORDER BY customer, repeat_key, audit_id
    ON CONFLICT (customer, merchant_id, repeat_key) WHERE repeat_key <> '' DO UPDATE
    SET event_count = a.event_count + excluded.event_count,
        last_at_ms = greatest(a.at_ms, a.last_at_ms, excluded.at_ms)
    RETURNING 1
"""
INSERT_AUDIT = _statement(_INSERT_AUDIT)


def _write(challenges: str) -> Statement:
    """Build a statement that writes challenges, counters and the audit.

    It returns how many challenges and counters it wrote. PostgreSQL may write the three tables in any order.
    """
    return _statement(f"""
        WITH challenges AS ({challenges}), counters AS ({_WRITE_COUNTERS}), records AS ({_INSERT_AUDIT})
        SELECT (SELECT count(*) FROM challenges) AS challenge_count, (SELECT count(*) FROM counters) AS counter_count
    """)


# Two statements, because a replaced challenge must leave the unique index of live ones before the new one enters it.
UPDATE = _write(_UPDATE_CHALLENGES)
INSERT = _write(_INSERT_CHALLENGES)
# The newest events of each customer, read by the key alone, so that the cost grows with the page and not with the
# history. An event that was repeated after start_ms began at most a day before it.
LIST_EVENTS = _statement(f"""
    SELECT e.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT audit_id AS event_id, at_ms, action, outcome, customer, challenge_id, program_id, points, channel,
            actor, reason, event_count, coalesce(last_at_ms, at_ms) AS last_at_ms
        FROM validation_audit
        WHERE customer = v.customer AND merchant_id = :merchant_id
            AND at_ms >= CAST(:start_ms AS bigint) - {DAY_MS} AND coalesce(last_at_ms, at_ms) >= :start_ms
            AND (at_ms, audit_id) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
            AND (CAST(:challenge_id AS text) = '' OR challenge_id = :challenge_id)
        ORDER BY at_ms DESC, audit_id DESC LIMIT :limit
    ) AS e
    ORDER BY at_ms DESC, event_id DESC LIMIT :limit
""")
END_LIVE = _statement("""
    UPDATE validation_challenges SET state = 'ENDED'
    WHERE customer = :customer AND merchant_id = :merchant_id AND state = 'LIVE'
    RETURNING challenge_id, program_id, points, channel
""")
CLAIM_CALL = _statement("""
    INSERT INTO missed_calls (call_digest, merchant_id, challenge_id, at_ms)
    VALUES (:call_digest, :merchant_id, '', :now_ms) ON CONFLICT DO NOTHING RETURNING 1
""")
READ_CALL = _statement("""
    SELECT challenge_id FROM missed_calls WHERE call_digest = :call_digest AND merchant_id = :merchant_id
""")
SET_CALL_CHALLENGE = _statement("""
    UPDATE missed_calls SET challenge_id = :challenge_id
    WHERE call_digest = :call_digest AND merchant_id = :merchant_id
""")
LOCK_CALLED = _statement(f"""
    SELECT {CHALLENGE} FROM validation_challenges
    WHERE destination_digest = ANY(CAST(:destination_digests AS bytea[])) AND merchant_id = :merchant_id
        AND state = 'LIVE' AND channel = 'MISSED_CALL' AND called_number = ANY(CAST(:called_numbers AS text[]))
        AND sent_at_ms <= :call_ms AND expires_at_ms > :now_ms
    ORDER BY sent_at_ms DESC, challenge_id LIMIT 1 FOR UPDATE
""")
CONFIRM = _statement("""
    UPDATE validation_challenges SET confirmed_at_ms = coalesce(confirmed_at_ms, :now_ms)
    WHERE challenge_id = :challenge_id AND merchant_id = :merchant_id
""")


def challenge_to_row(challenge: Challenge) -> tuple[Any, ...]:
    """Convert a challenge to a validation_challenge_row."""
    purpose = challenge.purpose
    return (
        challenge.challenge_id,
        purpose.customer,
        purpose.program_id,
        purpose.points,
        purpose.group_redemption,
        purpose.group_id,
        challenge.channel,
        challenge.destination_digest,
        challenge.called_number,
        challenge.key_id,
        challenge.code_digest,
        challenge.attempts,
        challenge.unnamed_attempts,
        challenge.state,
        challenge.delivery,
        challenge.sent_at_ms,
        challenge.resend_at_ms,
        challenge.expires_at_ms,
        challenge.confirmed_at_ms,
    )


def challenge_from_row(row: Row) -> Challenge:
    """Convert a row of the columns of CHALLENGE to a challenge."""
    (
        merchant_id,
        challenge_id,
        customer,
        program_id,
        points,
        group_redemption,
        group_id,
        channel,
        destination_digest,
        called_number,
        key_id,
        code_digest,
        attempts,
        unnamed_attempts,
        state,
        delivery,
        sent_at_ms,
        resend_at_ms,
        expires_at_ms,
        confirmed_at_ms,
    ) = row
    return Challenge(
        challenge_id=challenge_id,
        purpose=Purpose(merchant_id, customer, program_id, points, group_redemption, group_id),
        channel=Channel(channel),
        key_id=key_id,
        destination_digest=destination_digest,
        code_digest=code_digest,
        delivery=Delivery(delivery),
        sent_at_ms=sent_at_ms,
        resend_at_ms=resend_at_ms,
        expires_at_ms=expires_at_ms,
        attempts=attempts,
        unnamed_attempts=unnamed_attempts,
        called_number=called_number,
        confirmed_at_ms=confirmed_at_ms,
        state=ChallengeState(state),
    )


def counter_to_row(name: str, counter: SlidingWindowCounter) -> tuple[str, str, int]:
    """Convert a changed counter to a validation_counter_row."""
    return (name, json.dumps(counter.counts), counter.revision + 1)


def counter_from_row(row: Row) -> SlidingWindowCounter:
    """Convert a row of validation_tallies to a counter."""
    return SlidingWindowCounter(tuple((at_ms, count) for at_ms, count in json.loads(row.counts)), row.revision)
