"""The comments of columns in plain words.

Only comments change: no table is rewritten, and reads and writes continue.
"""

from alembic import op

revision = "0025"
down_revision = "0024"

COMMENTS = {
    "store_erasures.begun_at_ms": (
        "When the erasure began: customer webhooks older than this are ignored. NULL before that."
    ),
    "store_erasures.erased_to": "The last buyer erased; buyers are erased in the order of their ids.",
    "store_erasures.closed_at_ms": "When the erasure completed; NULL while the request is open.",
    "api_tokens.last_used_at_ms": "Accurate to the minute; NULL if never used.",
    "api_tokens.rotated_to": "The token that replaced this one; NULL if none did.",
    "api_tokens.client_names": (
        "Client certificate names, one of which the caller must present; empty if any caller may use the token."
    ),
    "points_accounts.opening": "The balance before the first entry; NULL while no entry counts.",
    "points_accounts.newest_at_ms": "The time of the newest entry; NULL while there is none.",
    "points_accounts.lots": (
        "The first open lots in drawing order, each [remaining, original, expires_at_ms or null, event_id]."
    ),
    "points_accounts.far_lots": (
        "The sum of the lots that are not in lots, with the first one's expiry and event: [points, expires_at_ms "
        "or null, event_id]; NULL if there are none."
    ),
    "points_accounts.drawn_to_ms": "The latest expiry of any lot drawn from so far.",
    "points_accounts.uncheckpointed": "The number of entries since the last checkpoint.",
    "points_accounts.revision": "Incremented by every write, so that a reader without a lock can detect a change.",
    "points_accounts.holds": (
        "Open and released holds, each [redemption_id, points, opened_at_ms, settle_by_ms, settlement scenes, "
        "is_released, settlement lead in ms (5000 if missing)]; NULL if there are none."
    ),
    "points_entries.outcome": "REFUSED rows record a refusal and are not entries of the ledger.",
    "points_entries.ordinal": "The position among the entries of the same millisecond, from 0.",
    "points_entries.draws": (
        "What the entry took from lots, each [points, expires_at_ms or null, event_id of the lot]."
    ),
    "points_entries.voided_at_ms": "When the entry was voided; NULL while it counts.",
    "points_entries.settled_redemption_id": "The redemption whose hold this entry settled.",
    "programs.criteria": "The criteria that are set, by name.",
    "programs.validation": "The validation settings, by name.",
    "programs.local_currency_decimals": "NULL for the number of decimals in ISO 4217.",
    "benefits.store_ids": "Empty for all stores.",
    "benefits.irrelevant_values": "Values of fields that BenefitsInfo defines as irrelevant for this benefit.",
    "custom_privileges.previlege_status": "Spelled as in SHOPLINE's API.",
    "customer_identifiers.source": "The system that issued the identifier; empty for the customer's own.",
    "customer_identifiers.since_ms": "When the customer got the identifier; NULL if registered with it.",
    "customer_identifiers.written": (
        "The form to return and to send messages to; NULL if it equals value, the form to compare."
    ),
    "customer_buyers.customer_id": "NULL for a buyer that a webhook named and no customer has.",
    "customer_buyers.mobile_as_of": "The newest update that contained the mobile number.",
    "customer_buyers.email_as_of": "The newest update that contained the e-mail address.",
    "customer_claims.buyer_id": "The buyer that the webhook was about.",
    "customer_claims.at_ms": "The webhook's time; with rank and event_id, it decides which webhook is newer.",
    "customer_claims.written": "As in customer_identifiers.",
    "customer_updates.is_deletion": (
        "NULL for redactions, whose body differs from that of any other topic, and for webhooks stored by earlier "
        "releases."
    ),
    "customer_tombstones.digest": "Keyed digest of the buyer, made with a code key.",
    "customer_audit.kind": (
        "The kind of identifier that was moved, without its value; for a buyer, see store_id and buyer_id."
    ),
    "validation_challenges.customer": "The resolved customer, who must enter the code.",
    "validation_challenges.destination_digest": (
        "Keyed digest of the destination, which is not stored in any other form."
    ),
    "validation_challenges.called_number": "The number to call; only for missed calls.",
    "validation_challenges.unnamed_attempts": (
        "Wrong guesses that did not name the challenge; they must not lock out those that do."
    ),
    "validation_challenges.confirmed_at_ms": "When the missed call was received.",
    "validation_tallies.counts": "[at_ms, count], oldest first.",
    "missed_calls.call_digest": "Digest of the provider's call id, which may contain a phone number.",
    "missed_calls.challenge_id": "The challenge that the call confirmed; empty if none.",
    "validation_audit.actor": "The id of the caller's token; empty if access control is off.",
    "validation_audit.last_at_ms": "When the event last happened, if it was repeated.",
    "validation_audit.repeat_key": (
        "What the repetitions counted in one row have in common; empty for rows that are not counted."
    ),
    "quarantined_webhooks.key_id": "The key that encrypts headers and body; NULL if they are not encrypted.",
    "quarantined_webhooks.headers": "[name, value] pairs in their original order, as JSON.",
    "quarantined_webhooks.body": "NULL if erased with its customer.",
    "quarantined_webhooks.kept_bytes": "The bytes that the webhook contributes to quarantine_usage.",
    "quarantined_webhooks.replay_event_id": "The event id of its replay; written before the replay is applied.",
    "quarantined_webhooks.replays_running": "The number of replays that may be running until replay_until_ms.",
    "quarantined_webhooks.subject_digest": (
        "Digest of the customer in the body, for erasing the webhook with that customer; NULL if there is none."
    ),
    "quarantined_webhooks.store_digest": (
        "Digest of the store of a customer webhook, for erasing the webhook with that store."
    ),
    "quarantined_webhooks.claimed_merchant_id": (
        "The merchant in the first copy's header; NULL in rows of earlier releases, which stored one row per such "
        "merchant."
    ),
    "quarantined_webhooks.is_contested": "Whether a copy named another merchant.",
    "quarantined_webhooks.signed_store_digest": "Digest of the store in the signed body; NULL if there is none.",
    "redemptions.redeemer": "customer ID, or buyer STORE_ID BUYER_ID for a buyer without a customer.",
    "redemptions.draws": (
        "In drawing order, each [store_id, buyer_id, points, expires_at_ms or null, event_id of the lot, reversed "
        "points]."
    ),
    "redemptions.actor": "The id of the caller's token; empty if access control is off.",
    "redemption_reversals.points": "The points requested; 0 for all that were left.",
    "redemption_reversals.redeemer": "As in redemptions.",
    "redemption_reversals.reversed_points": "The points actually reversed.",
    "redemption_reversals.actor": "The id of the caller's token; empty if access control is off.",
    "redemption_refusals.customer": "The customer of the refused call, in the form of redemptions.redeemer.",
    "redemption_refusals.reasons": "[status code or 0, reason, message, values], in the order of the response.",
    "redemption_refusals.reference": "The reference of RedeemPoints; empty for other methods.",
    "redemption_refusals.actor": "The id of the caller's token; empty if access control is off.",
    "redemption_audit.redeemer": "As in redemptions.",
    "redemption_audit.points": "The points settled or released; 0 if not recorded.",
    "redemption_audit.actor": (
        "The id of the caller's token; empty if access control is off, and for automatic releases."
    ),
}


def upgrade() -> None:
    """Replace the comments."""
    for column, comment in COMMENTS.items():
        quoted = comment.replace("'", "''")
        op.execute(f"COMMENT ON COLUMN {column} IS '{quoted}'")
