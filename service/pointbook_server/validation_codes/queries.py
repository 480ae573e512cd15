"""The SQL of one-time codes, and how its rows are read and written.

Whoever writes locks live challenges first, sorted by customer, and then counts, sorted by subject.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text

from pointbook_server.db.database import Row, Statement
from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.model import Challenge, ChallengeState, Delivery, Purpose
from pointbook_server.validation_codes.rate_limits import SlidingWindowCounter

COLUMNS = {
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
CHANGING = (
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
NAMES = ", ".join(("merchant_id", *COLUMNS))


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


def _rows(columns: Mapping[str, str]) -> str:
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays}) AS v ({', '.join(columns)})"


# The state is part of the text, or a plan for any state could not use the index of the live ones. Each is looked up by
# itself, whatever a plan expects: OFFSET keeps the look-up from being merged into a join. The two that a customer may
# have are locked in the order of that index.
LOCK_LIVE = _statement(f"""
    SELECT c.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT {NAMES} FROM validation_challenges
        WHERE customer = v.customer AND merchant_id = :merchant_id AND state = 'LIVE' OFFSET 0 FOR UPDATE
    ) AS c
""")
READ_LIVE = _statement(f"""
    SELECT {NAMES} FROM validation_challenges
    WHERE customer = :customer AND merchant_id = :merchant_id AND state = 'LIVE'
        AND (channel = 'MISSED_CALL') = CAST(:is_call AS boolean)
""")
# In the order of the customers: that of another call is in the way of each.
INSERT_CHALLENGES = _statement(f"""
    INSERT INTO validation_challenges ({NAMES})
    SELECT :merchant_id, {", ".join(COLUMNS)} FROM {_rows(COLUMNS)} ORDER BY customer
    ON CONFLICT DO NOTHING
""")
# All of them are there, locked: what would be inserted is updated.
UPDATE_CHALLENGES = _statement(f"""
    INSERT INTO validation_challenges ({NAMES})
    SELECT :merchant_id, {", ".join(COLUMNS)} FROM {_rows(COLUMNS)} ORDER BY challenge_id
    ON CONFLICT (challenge_id, merchant_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in CHANGING)}
""")
LOCK_TALLIES = _statement("""
    SELECT t.* FROM unnest(CAST(:subjects AS text[])) AS v (subject) CROSS JOIN LATERAL (
        SELECT subject, counts, revision FROM validation_tallies
        WHERE subject = v.subject AND merchant_id = :merchant_id OFFSET 0 FOR UPDATE
    ) AS t
""")
# A count that two calls begin at once is there for the second one, whose transaction runs again.
PUT_TALLIES = _statement("""
    INSERT INTO validation_tallies AS t (subject, merchant_id, counts, revision, updated_at_ms)
    SELECT subject, :merchant_id, counts, revision, :now_ms
    FROM unnest(CAST(:subjects AS text[]), CAST(:counts AS jsonb[]), CAST(:revisions AS bigint[]))
        AS v (subject, counts, revision)
    ORDER BY subject
    ON CONFLICT (subject, merchant_id) DO UPDATE
    SET counts = excluded.counts, revision = excluded.revision, updated_at_ms = excluded.updated_at_ms
    WHERE t.revision = excluded.revision - 1
""")
# In the order of the keys, since rows that are there are locked.
INSERT_AUDIT = _statement(f"""
    INSERT INTO validation_audit AS a (merchant_id, at_ms, {", ".join(AUDIT_COLUMNS)})
    SELECT :merchant_id, CAST(:now_ms AS bigint), {", ".join(AUDIT_COLUMNS)} FROM {_rows(AUDIT_COLUMNS)}
    ORDER BY customer, repeat_key, audit_id
    ON CONFLICT (customer, merchant_id, repeat_key) WHERE repeat_key <> '' DO UPDATE
    SET event_count = a.event_count + excluded.event_count,
        last_at_ms = greatest(a.at_ms, a.last_at_ms, excluded.at_ms)
""")
# The newest events of each name, by the key alone: what it costs grows with the page, not with the history. One that
# was repeated after the start began a day before it at the earliest.
LIST_EVENTS = _statement("""
    SELECT e.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT audit_id AS event_id, at_ms, action, outcome, customer, challenge_id, program_id, points, channel,
            actor, reason, event_count, coalesce(last_at_ms, at_ms) AS last_at_ms
        FROM validation_audit
        WHERE customer = v.customer AND merchant_id = :merchant_id
            AND at_ms >= CAST(:start_ms AS bigint) - 86400000 AND coalesce(last_at_ms, at_ms) >= :start_ms
            AND (at_ms, audit_id) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
            AND (CAST(:challenge_id AS text) = '' OR challenge_id = :challenge_id)
        ORDER BY at_ms DESC, audit_id DESC LIMIT :limit
    ) AS e
    ORDER BY at_ms DESC, event_id DESC LIMIT :limit
""")
# The code may have been renewed since it was compared, and a missed call needs none but must have been seen.
CONSUME = _statement("""
    UPDATE validation_challenges SET state = 'USED'
    WHERE customer = :customer AND merchant_id = :merchant_id AND state = 'LIVE' AND challenge_id = :challenge_id
        AND code_digest = :code_digest AND expires_at_ms > :now_ms
        AND (channel <> 'MISSED_CALL' OR confirmed_at_ms IS NOT NULL)
""")
END_LIVE = _statement("""
    UPDATE validation_challenges SET state = 'ENDED'
    WHERE customer = :customer AND merchant_id = :merchant_id AND state = 'LIVE'
    RETURNING challenge_id, program_id, points, channel
""")
CLAIM_CALL = _statement("""
    INSERT INTO missed_calls (call_digest, merchant_id, challenge_id, at_ms)
    VALUES (:call_digest, :merchant_id, '', :now_ms) ON CONFLICT DO NOTHING
""")
READ_CALL = _statement("""
    SELECT challenge_id FROM missed_calls WHERE call_digest = :call_digest AND merchant_id = :merchant_id
""")
NAME_CALL = _statement("""
    UPDATE missed_calls SET challenge_id = :challenge_id
    WHERE call_digest = :call_digest AND merchant_id = :merchant_id
""")
LOCK_CALLED = _statement(f"""
    SELECT {NAMES} FROM validation_challenges
    WHERE destination_digest = ANY(CAST(:destination_digests AS bytea[])) AND merchant_id = :merchant_id
        AND state = 'LIVE' AND channel = 'MISSED_CALL' AND called_number = ANY(CAST(:called_numbers AS text[]))
        AND sent_at_ms <= :call_ms AND expires_at_ms > :now_ms
    ORDER BY sent_at_ms DESC, challenge_id LIMIT 1 FOR UPDATE
""")
CONFIRM = _statement("""
    UPDATE validation_challenges SET confirmed_at_ms = coalesce(confirmed_at_ms, :now_ms)
    WHERE challenge_id = :challenge_id AND merchant_id = :merchant_id
""")
LIST_OLD_MERCHANTS = _statement("""
    SELECT DISTINCT merchant_id FROM (
        (SELECT merchant_id FROM validation_challenges WHERE expires_at_ms <= :before_ms AND points > 0
            ORDER BY expires_at_ms LIMIT :limit)
        UNION ALL (SELECT merchant_id FROM validation_tallies WHERE updated_at_ms <= :before_ms AND revision > 0
            ORDER BY updated_at_ms LIMIT :limit)
        UNION ALL (SELECT merchant_id FROM missed_calls WHERE at_ms <= :before_ms AND at_ms > 0
            ORDER BY at_ms LIMIT :limit)
    ) AS old
""")


def _delete_old(table: str, key: str, time: str, is_indexed: str) -> Statement:
    """Delete some old rows of a merchant that nobody works on."""
    return _statement(f"""
        DELETE FROM {table} WHERE merchant_id = :merchant_id AND {key} = ANY(ARRAY(
            SELECT {key} FROM {table} WHERE {time} <= :before_ms AND merchant_id = :merchant_id AND {is_indexed}
            ORDER BY {time} LIMIT :limit FOR UPDATE SKIP LOCKED
        ))
    """)


DELETE_OLD = {
    "challenges": _delete_old("validation_challenges", "challenge_id", "expires_at_ms", "points > 0"),
    "tallies": _delete_old("validation_tallies", "subject", "updated_at_ms", "revision > 0"),
    "missed_calls": _delete_old("missed_calls", "call_digest", "at_ms", "at_ms > 0"),
}


def to_columns(challenges: Sequence[Challenge]) -> dict[str, list[Any]]:
    """Write challenges as one array a column."""
    rows = [_write_challenge(challenge) for challenge in challenges]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _write_challenge(challenge: Challenge) -> dict[str, Any]:
    """Write a challenge as its columns."""
    purpose = challenge.purpose
    return {
        "challenge_id": challenge.challenge_id,
        "customer": purpose.customer,
        "program_id": purpose.program_id,
        "points": purpose.points,
        "group_redemption": purpose.group_redemption,
        "group_id": purpose.group_id,
        "channel": challenge.channel.value,
        "destination_digest": challenge.destination_digest,
        "called_number": challenge.called_number,
        "key_id": challenge.key_id,
        "code_digest": challenge.code_digest,
        "attempts": challenge.attempts,
        "unnamed_attempts": challenge.unnamed_attempts,
        "state": challenge.state.value,
        "delivery": challenge.delivery.value,
        "sent_at_ms": challenge.sent_at_ms,
        "resend_at_ms": challenge.resend_at_ms,
        "expires_at_ms": challenge.expires_at_ms,
        "confirmed_at_ms": challenge.confirmed_at_ms,
    }


def read_challenge(row: Row) -> Challenge:
    """Read a row of validation_challenges."""
    purpose = Purpose(
        merchant_id=row.merchant_id,
        customer=row.customer,
        program_id=row.program_id,
        points=row.points,
        group_redemption=row.group_redemption,
        group_id=row.group_id,
    )
    return Challenge(
        challenge_id=row.challenge_id,
        purpose=purpose,
        channel=Channel(row.channel),
        key_id=row.key_id,
        destination_digest=row.destination_digest,
        code_digest=row.code_digest,
        delivery=Delivery(row.delivery),
        sent_at_ms=row.sent_at_ms,
        resend_at_ms=row.resend_at_ms,
        expires_at_ms=row.expires_at_ms,
        attempts=row.attempts,
        unnamed_attempts=row.unnamed_attempts,
        called_number=row.called_number,
        confirmed_at_ms=row.confirmed_at_ms,
        state=ChallengeState(row.state),
    )


def write_tally(tally: SlidingWindowCounter) -> str:
    """Write the counts of a tally."""
    return json.dumps(tally.counts)


def read_tally(row: Row) -> SlidingWindowCounter:
    """Read a row of validation_tallies."""
    return SlidingWindowCounter(tuple((at_ms, count) for at_ms, count in json.loads(row.counts)), row.revision)
