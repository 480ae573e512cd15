"""The tables after the newest migration; a test compares the two.

Every key contains `merchant_id`. The most selective column leads each index, so that a plan made while a table is empty
does not scan all rows of a merchant later. Times are in milliseconds since 1970 (UTC); points are integers.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData()

stores = Table(
    "stores",
    metadata,
    Column("store_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("shop_domain", Text, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    Column(
        "last_webhook_at_ms",
        BigInteger,
        comment="When a webhook of the store was last accepted, written in rounds of about a minute; NULL: never.",
    ),
    PrimaryKeyConstraint("store_id", name="pk_stores"),
    UniqueConstraint("merchant_id", "store_id", name="uq_stores_merchant_id_store_id"),
)

store_erasures = Table(
    "store_erasures",
    metadata,
    # Requests to erase the personal data of a store's customers, and how far each erasure is.
    Column("event_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("requested_at_ms", BigInteger, nullable=False),
    Column("due_at_ms", BigInteger, nullable=False),
    Column(
        "begun_at_ms",
        BigInteger,
        comment="When the erasure began: customer webhooks older than this are ignored. NULL before that.",
    ),
    Column(
        "erased_to", Text, nullable=False, comment="The last buyer erased; buyers are erased in the order of their ids."
    ),
    Column("closed_at_ms", BigInteger, comment="When the erasure completed; NULL while the request is open."),
    Column("reason", Text, nullable=False),
    PrimaryKeyConstraint("event_id", "merchant_id", name="pk_store_erasures"),
    ForeignKeyConstraint(
        ["merchant_id", "store_id"], ["stores.merchant_id", "stores.store_id"], name="fk_store_erasures_stores"
    ),
    Index("ix_store_erasures_store", "store_id", "merchant_id"),
    Index("ix_store_erasures_merchant", "merchant_id", "event_id"),
    Index(
        "uq_store_erasures_open",
        "store_id",
        "merchant_id",
        unique=True,
        postgresql_where=text("closed_at_ms IS NULL"),
    ),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("token_id", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("name", Text, nullable=False),
    Column("merchants", ARRAY(Text), nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
    Column("last_used_at_ms", BigInteger, comment="Accurate to the minute; NULL if never used."),
    Column("rotated_to", Text, comment="The token that replaced this one; NULL if none did."),
    Column(
        "client_names",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'::text[]"),
        comment="Client certificate names, one of which the caller must present; empty if any caller may use the "
        "token.",
    ),
    PrimaryKeyConstraint("token_id", name="pk_api_tokens"),
    CheckConstraint("octet_length(secret_hash) = 32", name="ck_api_tokens_secret_hash"),
)

points_accounts = Table(
    "points_accounts",
    metadata,
    Column("merchant_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("buyer_id", Text, nullable=False),
    Column("opening", BigInteger, comment="The balance before the first entry; NULL while no entry counts."),
    Column("balance", BigInteger, nullable=False, server_default=text("0")),
    Column("drift", BigInteger, nullable=False, server_default=text("0")),
    Column("silently_expired", BigInteger, nullable=False, server_default=text("0")),
    Column("lifetime_points", BigInteger, nullable=False, server_default=text("0")),
    Column("newest_at_ms", BigInteger, comment="The time of the newest entry; NULL while there is none."),
    Column(
        "lots",
        JSONB,
        nullable=False,
        server_default=text("'[]'::jsonb"),
        comment="The first open lots in drawing order, each [remaining, original, expires_at_ms or null, event_id].",
    ),
    Column(
        "far_lots",
        JSONB,
        comment="The sum of the lots that are not in lots, with the first one's expiry and event: [points, "
        "expires_at_ms or null, event_id]; NULL if there are none.",
    ),
    Column(
        "drawn_to_ms",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="The latest expiry of any lot drawn from so far.",
    ),
    Column(
        "uncheckpointed",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="The number of entries since the last checkpoint.",
    ),
    Column(
        "revision",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Incremented by every write, so that a reader without a lock can detect a change.",
    ),
    Column(
        "holds",
        JSONB,
        comment="Open and released holds, each [redemption_id, points, opened_at_ms, settle_by_ms, settlement scenes,"
        " is_released, settlement lead in ms (5000 if missing)]; NULL if there are none.",
    ),
    PrimaryKeyConstraint("buyer_id", "store_id", "merchant_id", name="pk_points_accounts"),
    ForeignKeyConstraint(
        ["merchant_id", "store_id"], ["stores.merchant_id", "stores.store_id"], name="fk_points_accounts_stores"
    ),
    CheckConstraint("silently_expired >= 0", name="ck_points_accounts_silently_expired"),
    CheckConstraint("lifetime_points >= 0", name="ck_points_accounts_lifetime_points"),
    # Few accounts drift, so this index is small and can lead with merchant_id.
    Index(
        "ix_points_accounts_drifting",
        "merchant_id",
        "store_id",
        "buyer_id",
        postgresql_where=text("drift <> 0"),
    ),
    # Every event updates its row. Free space in the page allows HOT updates, which write no index.
    postgresql_with={"fillfactor": 70},
)

points_checkpoints = Table(
    "points_checkpoints",
    metadata,
    # The account after all entries up to and including newest_at_ms.
    Column("merchant_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("buyer_id", Text, nullable=False),
    Column("newest_at_ms", BigInteger, nullable=False),
    Column("opening", BigInteger),
    Column("balance", BigInteger, nullable=False),
    Column("drift", BigInteger, nullable=False),
    Column("silently_expired", BigInteger, nullable=False),
    Column("lifetime_points", BigInteger, nullable=False),
    Column("lots", JSONB, nullable=False),
    Column("far_lots", JSONB),
    Column("drawn_to_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("buyer_id", "store_id", "merchant_id", "newest_at_ms", name="pk_points_checkpoints"),
)

points_entries = Table(
    "points_entries",
    metadata,
    # The event and how it was received. A trigger rejects updates of these columns, and deletion.
    Column("event_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("buyer_id", Text, nullable=False),
    Column("update_type", Text, nullable=False),
    Column("scene", Text, nullable=False),
    Column("updated_value", BigInteger, nullable=False),
    Column("points_balance", BigInteger),
    Column("expires_at_ms", BigInteger),
    Column("updated_at_ms", BigInteger, nullable=False),
    Column("webhook_id", Text, nullable=False),
    Column("shop_domain", Text, nullable=False),
    Column("api_version", Text, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False, comment="REFUSED rows record a refusal and are not entries of the ledger."),
    # Derived by the fold from the entry's position; rewritten when an earlier event arrives late.
    Column(
        "ordinal", Integer, nullable=False, comment="The position among the entries of the same millisecond, from 0."
    ),
    Column("balance_before", BigInteger, nullable=False),
    Column("balance_after", BigInteger, nullable=False),
    Column("drift", BigInteger, nullable=False),
    Column("silently_expired", BigInteger, nullable=False),
    Column(
        "draws",
        JSONB,
        nullable=False,
        comment="What the entry took from lots, each [points, expires_at_ms or null, event_id of the lot].",
    ),
    Column("voided_at_ms", BigInteger, comment="When the entry was voided; NULL while it counts."),
    Column("void_reason", Text),
    Column("settled_redemption_id", Text, comment="The redemption whose hold this entry settled."),
    PrimaryKeyConstraint("event_id", "merchant_id", name="pk_points_entries"),
    CheckConstraint("update_type IN ('INCREASE', 'DECREASE')", name="ck_points_entries_update_type"),
    CheckConstraint("updated_value >= 0", name="ck_points_entries_updated_value"),
    CheckConstraint("outcome IN ('APPLIED', 'LATE', 'REFUSED')", name="ck_points_entries_outcome"),
    Index("ix_points_entries_account", "buyer_id", "store_id", "merchant_id", "updated_at_ms"),
    # For ListExpiringPoints. It has columns of the event only, so that updates do not write it.
    Index(
        "ix_points_entries_expiry",
        "store_id",
        "merchant_id",
        "expires_at_ms",
        "buyer_id",
        postgresql_where=text("expires_at_ms IS NOT NULL"),
    ),
)

points_voidings = Table(
    "points_voidings",
    metadata,
    # The permanent audit of voiding and unvoiding entries.
    Column("voiding_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("event_id", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("event_id", "merchant_id", "voiding_id", name="pk_points_voidings"),
    CheckConstraint("action IN ('VOID', 'UNVOID')", name="ck_points_voidings_action"),
)

programs = Table(
    "programs",
    metadata,
    Column("merchant_id", Text, nullable=False),
    Column("program_id", BigInteger, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("store_ids", ARRAY(Text), nullable=False),
    Column("redemption_enabled", Boolean, nullable=False),
    Column("time_zone", Text, nullable=False),
    Column("default_region", Text, nullable=False),
    Column("allowed_regions", ARRAY(Text), nullable=False),
    Column("criteria", JSONB, nullable=False, comment="The criteria that are set, by name."),
    Column("point_value", Numeric),
    Column("currency_code", Text, nullable=False),
    Column("local_currency_code", Text, nullable=False),
    Column("local_currency_rate", Numeric),
    Column("allow_group_redemption", Boolean, nullable=False),
    Column("allow_cross_program_redemption", Boolean, nullable=False),
    Column("settlement_window_ms", BigInteger, nullable=False),
    Column("settlement_scenes", ARRAY(Text), nullable=False),
    Column("validation", JSONB, nullable=False, comment="The validation settings, by name."),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    Column("local_currency_decimals", Integer, comment="NULL for the number of decimals in ISO 4217."),
    Column("settlement_lead_ms", BigInteger, comment="NULL for the default."),
    PrimaryKeyConstraint("merchant_id", "program_id", name="pk_programs"),
    CheckConstraint("program_id >= 1", name="ck_programs_program_id"),
    CheckConstraint("point_value > 0", name="ck_programs_point_value"),
    CheckConstraint("local_currency_rate > 0", name="ck_programs_local_currency_rate"),
    CheckConstraint("local_currency_decimals BETWEEN 0 AND 4", name="ck_programs_local_currency_decimals"),
    CheckConstraint("settlement_lead_ms BETWEEN 0 AND 86400000", name="ck_programs_settlement_lead"),
)

benefits = Table(
    "benefits",
    metadata,
    # Enums hold SHOPLINE's names, including undocumented ones; empty if absent.
    Column("benefit_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("store_ids", ARRAY(Text), nullable=False, comment="Empty for all stores."),
    Column("level_code", Text, nullable=False),
    Column("membership_type", Text, nullable=False),
    Column("reward_scene", Text, nullable=False),
    Column("reward_type", Text, nullable=False),
    Column("benefits_status", Text, nullable=False),
    Column("details", JSONB, nullable=False, comment="The other fields of BenefitsInfo that are present."),
    Column(
        "irrelevant_values",
        JSONB,
        nullable=False,
        comment="Values of fields that BenefitsInfo defines as irrelevant for this benefit.",
    ),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("benefit_id", "merchant_id", name="pk_benefits"),
    Index("ix_benefits_merchant", "merchant_id", "benefit_id"),
)

custom_privileges = Table(
    "custom_privileges",
    metadata,
    Column("privilege_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("level_code", Text, nullable=False),
    Column("privilege_name", Text),
    Column("privilege_description", Text),
    Column("benefits_icon", Text),
    Column("previlege_status", Text, comment="Spelled as in SHOPLINE's API."),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("privilege_id", "merchant_id", name="pk_custom_privileges"),
    Index("ix_custom_privileges_merchant", "merchant_id", "privilege_id"),
)

customers = Table(
    "customers",
    metadata,
    Column("customer_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("language", Text, nullable=False),
    Column("fraud_blocked", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("customer_id", "merchant_id", name="pk_customers"),
)

customer_identifiers = Table(
    "customer_identifiers",
    metadata,
    Column("value", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column(
        "source", Text, nullable=False, comment="The system that issued the identifier; empty for the customer's own."
    ),
    Column("account_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("customer_id", Text, nullable=False),
    Column("since_ms", BigInteger, comment="When the customer got the identifier; NULL if registered with it."),
    Column(
        "written",
        Text,
        comment="The form to return and to send messages to; NULL if it equals value, the form to compare.",
    ),
    PrimaryKeyConstraint("value", "kind", "source", "account_id", "merchant_id", name="pk_customer_identifiers"),
    ForeignKeyConstraint(
        ["customer_id", "merchant_id"],
        ["customers.customer_id", "customers.merchant_id"],
        name="fk_customer_identifiers_customers",
    ),
    Index("ix_customer_identifiers_customer", "customer_id", "merchant_id"),
)

customer_buyers = Table(
    "customer_buyers",
    metadata,
    Column("buyer_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("customer_id", Text, comment="NULL for a buyer that a webhook named and no customer has."),
    Column("mobile_as_of", Text, comment="The newest update that contained the mobile number."),
    Column("email_as_of", Text, comment="The newest update that contained the e-mail address."),
    PrimaryKeyConstraint("buyer_id", "store_id", "merchant_id", name="pk_customer_buyers"),
    ForeignKeyConstraint(
        ["customer_id", "merchant_id"],
        ["customers.customer_id", "customers.merchant_id"],
        name="fk_customer_buyers_customers",
    ),
    Index("ix_customer_buyers_customer", "customer_id", "merchant_id"),
    Index("ix_customer_buyers_store", "store_id", "merchant_id", "buyer_id"),
)

customer_claims = Table(
    "customer_claims",
    metadata,
    # A contact that a customer's newest webhook contains and another customer has.
    Column("customer_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("buyer_id", Text, nullable=False, comment="The buyer that the webhook was about."),
    Column(
        "at_ms",
        BigInteger,
        nullable=False,
        comment="The webhook's time; with rank and event_id, it decides which webhook is newer.",
    ),
    Column("rank", Integer, nullable=False),
    Column("event_id", Text(collation="C"), nullable=False),
    Column("written", Text, comment="As in customer_identifiers."),
    PrimaryKeyConstraint("customer_id", "kind", "merchant_id", name="pk_customer_claims"),
    ForeignKeyConstraint(
        ["customer_id", "merchant_id"],
        ["customers.customer_id", "customers.merchant_id"],
        name="fk_customer_claims_customers",
    ),
    CheckConstraint("kind IN ('MOBILE', 'EMAIL')", name="ck_customer_claims_kind"),
    Index("ix_customer_claims_buyer", "buyer_id", "merchant_id"),
    Index("ix_customer_claims_value", "value", "kind", "merchant_id", "at_ms", "rank", "event_id"),
)

customer_updates = Table(
    "customer_updates",
    metadata,
    # The webhooks applied. A redaction deletes earlier ones: digests of personal data are personal data.
    Column("event_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("buyer_id", Text, nullable=False),
    Column("content_digest", LargeBinary, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    Column(
        "is_deletion",
        Boolean,
        comment="NULL for redactions, whose body differs from that of any other topic, and for webhooks stored by "
        "earlier releases.",
    ),
    PrimaryKeyConstraint("event_id", "merchant_id", name="pk_customer_updates"),
    CheckConstraint("octet_length(content_digest) = 32", name="ck_customer_updates_content_digest"),
    Index("ix_customer_updates_buyer", "buyer_id", "store_id", "merchant_id"),
    # As for all indexes of times, the condition holds for every row, and only the statements of clean-ups repeat it.
    Index("ix_customer_updates_updated", "updated_at_ms", "merchant_id", postgresql_where=text("updated_at_ms > 0")),
)

customer_tombstones = Table(
    "customer_tombstones",
    metadata,
    Column("digest", LargeBinary, nullable=False, comment="Keyed digest of the buyer, made with a code key."),
    Column("merchant_id", Text, nullable=False),
    Column("redacted_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("digest", "merchant_id", name="pk_customer_tombstones"),
    CheckConstraint("octet_length(digest) = 32", name="ck_customer_tombstones_digest"),
)

customer_audit = Table(
    "customer_audit",
    metadata,
    # The audit of moved and erased identifiers, without personal data. Triggers reject changes, and deletion within 90
    # days.
    Column("audit_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("customer_id", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column(
        "kind",
        Text,
        comment="The kind of identifier that was moved, without its value; for a buyer, see store_id and buyer_id.",
    ),
    Column("store_id", Text),
    Column("buyer_id", Text),
    Column("to_customer_id", Text),
    Column("reason", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("customer_id", "merchant_id", "audit_id", name="pk_customer_audit"),
    CheckConstraint("action IN ('MOVE', 'REDACT', 'ERASE_STORE', 'DETACH')", name="ck_customer_audit_action"),
    Index("ix_customer_audit_at", "at_ms", "merchant_id", postgresql_where=text("at_ms > 0")),
)

user_groups = Table(
    "user_groups",
    metadata,
    Column("group_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("external_id", Text),
    Column("primary_customer_id", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("group_id", "merchant_id", name="pk_user_groups"),
    UniqueConstraint("external_id", "merchant_id", name="uq_user_groups_external_id"),
    UniqueConstraint("primary_customer_id", "merchant_id", name="uq_user_groups_primary_customer_id"),
    ForeignKeyConstraint(
        ["primary_customer_id", "merchant_id"],
        ["customers.customer_id", "customers.merchant_id"],
        name="fk_user_groups_customers",
    ),
)

user_group_members = Table(
    "user_group_members",
    metadata,
    Column("customer_id", Text, nullable=False),
    Column("group_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("can_redeem", Boolean, nullable=False),
    Column("blocked", Boolean, nullable=False),
    Column("is_default", Boolean, nullable=False),
    PrimaryKeyConstraint("customer_id", "group_id", "merchant_id", name="pk_user_group_members"),
    ForeignKeyConstraint(
        ["customer_id", "merchant_id"],
        ["customers.customer_id", "customers.merchant_id"],
        name="fk_user_group_members_customers",
    ),
    ForeignKeyConstraint(
        ["group_id", "merchant_id"],
        ["user_groups.group_id", "user_groups.merchant_id"],
        name="fk_user_group_members_user_groups",
        ondelete="CASCADE",
    ),
    Index("ix_user_group_members_group", "group_id", "merchant_id"),
    Index(
        "uq_user_group_members_default",
        "customer_id",
        "merchant_id",
        unique=True,
        postgresql_where=text("is_default"),
    ),
)

validation_challenges = Table(
    "validation_challenges",
    metadata,
    Column("challenge_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("customer", Text, nullable=False, comment="The resolved customer, who must enter the code."),
    Column("program_id", BigInteger, nullable=False),
    Column("points", BigInteger, nullable=False),
    Column("group_redemption", Boolean, nullable=False),
    Column("group_id", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column(
        "destination_digest",
        LargeBinary,
        nullable=False,
        comment="Keyed digest of the destination, which is not stored in any other form.",
    ),
    Column("called_number", Text, nullable=False, comment="The number to call; only for missed calls."),
    Column("key_id", Text, nullable=False),
    Column("code_digest", LargeBinary, nullable=False),
    Column("attempts", Integer, nullable=False, comment="Wrong guesses that named the challenge."),
    Column(
        "unnamed_attempts",
        Integer,
        nullable=False,
        comment="Wrong guesses that did not name the challenge; they must not lock out those that do.",
    ),
    Column("state", Text, nullable=False),
    Column("delivery", Text, nullable=False),
    Column("sent_at_ms", BigInteger, nullable=False),
    Column("resend_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("confirmed_at_ms", BigInteger, comment="When the missed call was received."),
    PrimaryKeyConstraint("challenge_id", "merchant_id", name="pk_validation_challenges"),
    CheckConstraint("octet_length(code_digest) = 32", name="ck_validation_challenges_code_digest"),
    CheckConstraint("octet_length(destination_digest) = 32", name="ck_validation_challenges_destination_digest"),
    CheckConstraint("attempts BETWEEN 0 AND 5", name="ck_validation_challenges_attempts"),
    CheckConstraint("unnamed_attempts BETWEEN 0 AND 5", name="ck_validation_challenges_unnamed_attempts"),
    CheckConstraint("state IN ('LIVE', 'REPLACED', 'USED', 'ENDED')", name="ck_validation_challenges_state"),
    CheckConstraint("delivery IN ('PENDING', 'SENT', 'FAILED', 'UNCERTAIN')", name="ck_validation_challenges_delivery"),
    # A customer has at most one live challenge for sent codes and one for a missed call, so that parallel requests
    # send one message.
    Index(
        "uq_validation_challenges_live",
        "customer",
        "merchant_id",
        text("(channel = 'MISSED_CALL')"),
        unique=True,
        postgresql_where=text("state = 'LIVE'"),
    ),
    Index(
        "ix_validation_challenges_called",
        "destination_digest",
        "merchant_id",
        postgresql_where=text("state = 'LIVE' AND channel = 'MISSED_CALL'"),
    ),
    # The condition of this index holds for every row, as do `revision > 0` and `at_ms > 0` below. Only the cleanup
    # statements repeat it: a plan made while the table is empty cannot choose the index for any other statement.
    Index("ix_validation_challenges_expires", "expires_at_ms", "merchant_id", postgresql_where=text("points > 0")),
)

validation_tallies = Table(
    "validation_tallies",
    metadata,
    # Sliding-window counters: wrong guesses and missed calls of a customer, messages to a destination (a keyed digest)
    # and messages of a merchant.
    Column("subject", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("counts", JSONB, nullable=False, comment="[at_ms, count], oldest first."),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("subject", "merchant_id", name="pk_validation_tallies"),
    Index("ix_validation_tallies_updated", "updated_at_ms", "merchant_id", postgresql_where=text("revision > 0")),
)

missed_calls = Table(
    "missed_calls",
    metadata,
    # Calls reported by a telephony provider. Each confirms at most one challenge.
    Column(
        "call_digest",
        Text,
        nullable=False,
        comment="Digest of the provider's call id, which may contain a phone number.",
    ),
    Column("merchant_id", Text, nullable=False),
    Column("challenge_id", Text, nullable=False, comment="The challenge that the call confirmed; empty if none."),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("call_digest", "merchant_id", name="pk_missed_calls"),
    Index("ix_missed_calls_at", "at_ms", "merchant_id", postgresql_where=text("at_ms > 0")),
)

validation_audit = Table(
    "validation_audit",
    metadata,
    # The audit of codes: who issued, guessed or reset them, for which customer, with which outcome. It never holds a
    # code or a contact.
    Column("audit_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("customer", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("action", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("challenge_id", Text, nullable=False),
    Column("program_id", BigInteger, nullable=False),
    Column("points", BigInteger, nullable=False),
    Column("channel", Text, nullable=False),
    Column("actor", Text, nullable=False, comment="The id of the caller's token; empty if access control is off."),
    Column("reason", Text, nullable=False),
    Column("event_count", BigInteger, nullable=False, server_default=text("1")),
    Column("last_at_ms", BigInteger, comment="When the event last happened, if it was repeated."),
    Column(
        "repeat_key",
        Text,
        nullable=False,
        server_default="",
        comment="What the repetitions counted in one row have in common; empty for rows that are not counted.",
    ),
    PrimaryKeyConstraint("customer", "merchant_id", "at_ms", "audit_id", name="pk_validation_audit"),
    CheckConstraint(
        "action IN ('ISSUE', 'DELIVER', 'GUESS', 'USE', 'CONFIRM', 'RESET', 'END')", name="ck_validation_audit_action"
    ),
    # Repeated refusals are counted in one row, so that callers cannot add rows without limit.
    Index(
        "uq_validation_audit_repeated",
        "customer",
        "merchant_id",
        "repeat_key",
        unique=True,
        postgresql_where=text("repeat_key <> ''"),
    ),
    Index("ix_validation_audit_at", "at_ms", "merchant_id", postgresql_where=text("at_ms > 0")),
)

quarantined_webhooks = Table(
    "quarantined_webhooks",
    metadata,
    Column("quarantine_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("body_digest", LargeBinary, nullable=False, comment="Keyed for customer topics."),
    Column("detail", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("key_id", Text, comment="The key that encrypts headers and body; NULL if they are not encrypted."),
    Column("headers", LargeBinary, nullable=False, comment="[name, value] pairs in their original order, as JSON."),
    Column("body", LargeBinary, comment="NULL if erased with its customer."),
    Column("body_size", Integer, nullable=False),
    Column(
        "kept_bytes", BigInteger, nullable=False, comment="The bytes that the webhook contributes to quarantine_usage."
    ),
    Column("received_at_ms", BigInteger, nullable=False),
    Column("last_received_at_ms", BigInteger, nullable=False),
    Column("receive_count", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("replay_event_id", Text, comment="The event id of its replay; written before the replay is applied."),
    Column(
        "replays_running",
        BigInteger,
        nullable=False,
        comment="The number of replays that may be running until replay_until_ms.",
    ),
    Column("replay_until_ms", BigInteger, nullable=False),
    Column("replayed_at_ms", BigInteger),
    Column(
        "subject_digest",
        LargeBinary,
        comment="Digest of the customer in the body, for erasing the webhook with that customer; NULL if there is "
        "none.",
    ),
    Column(
        "store_digest",
        LargeBinary,
        comment="Digest of the store of a customer webhook, for erasing the webhook with that store.",
    ),
    Column(
        "claimed_merchant_id",
        Text,
        comment="The merchant in the first copy's header; NULL in rows of earlier releases, which stored one row per "
        "such merchant.",
    ),
    Column(
        "is_contested",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Whether a copy named another merchant.",
    ),
    Column(
        "signed_store_digest", LargeBinary, comment="Digest of the store in the signed body; NULL if there is none."
    ),
    PrimaryKeyConstraint("quarantine_id", "merchant_id", name="pk_quarantined_webhooks"),
    UniqueConstraint("body_digest", "reason", "merchant_id", name="uq_quarantined_webhooks_body"),
    CheckConstraint("octet_length(body_digest) = 32", name="ck_quarantined_webhooks_body_digest"),
    CheckConstraint("state IN ('QUARANTINED', 'REPLAYED')", name="ck_quarantined_webhooks_state"),
    CheckConstraint(
        "state <> 'REPLAYED' OR (replay_event_id IS NOT NULL AND replayed_at_ms IS NOT NULL)",
        name="ck_quarantined_webhooks_replayed",
    ),
    Index("ix_quarantined_webhooks_received", "received_at_ms", "quarantine_id", "merchant_id"),
    Index(
        "ix_quarantined_webhooks_subject",
        "subject_digest",
        "merchant_id",
        postgresql_where=text("subject_digest IS NOT NULL"),
    ),
    Index(
        "ix_quarantined_webhooks_store",
        "store_digest",
        "merchant_id",
        "quarantine_id",
        postgresql_where=text("store_digest IS NOT NULL AND body IS NOT NULL"),
    ),
    # Rows of earlier releases may share a digest under different reasons.
    Index(
        "uq_quarantined_webhooks_digest",
        "body_digest",
        "merchant_id",
        unique=True,
        postgresql_where=text("claimed_merchant_id IS NOT NULL"),
    ),
    Index(
        "ix_quarantined_webhooks_signed_store",
        "signed_store_digest",
        "merchant_id",
        postgresql_where=text("signed_store_digest IS NOT NULL"),
    ),
    Index(
        "ix_quarantined_webhooks_finished",
        text("greatest(last_received_at_ms, replayed_at_ms)"),
        "merchant_id",
        postgresql_where=text("state = 'REPLAYED' OR body IS NULL"),
    ),
)

quarantine_usage = Table(
    "quarantine_usage",
    metadata,
    Column("merchant_id", Text, nullable=False),
    Column("webhooks", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("merchant_id", name="pk_quarantine_usage"),
    CheckConstraint("webhooks >= 0", name="ck_quarantine_usage_webhooks"),
    CheckConstraint("bytes >= 0", name="ck_quarantine_usage_bytes"),
)

redemptions = Table(
    "redemptions",
    metadata,
    Column("redemption_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column(
        "redeemer",
        Text,
        nullable=False,
        comment="customer ID, or buyer STORE_ID BUYER_ID for a buyer without a customer.",
    ),
    Column("program_id", BigInteger, nullable=False),
    Column("points", BigInteger, nullable=False),
    Column("group_redemption", Boolean, nullable=False),
    Column("group_id", Text, nullable=False),
    Column("transaction_number", Text, nullable=False),
    Column("notes", Text, nullable=False),
    Column("redeem_value", Text, nullable=False),
    Column("redeem_local_value", Text, nullable=False),
    Column("points_currency_ratio", Text, nullable=False),
    Column("active_points", BigInteger, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("settle_by_ms", BigInteger, nullable=False),
    Column(
        "draws",
        JSONB,
        nullable=False,
        comment="In drawing order, each [store_id, buyer_id, points, expires_at_ms or null, event_id of the lot, "
        "reversed points].",
    ),
    Column("holds", JSONB, nullable=False, comment="[store_id, buyer_id, points, OPEN or SETTLED or RELEASED]."),
    # Sums over holds and draws, for filters.
    Column("open_points", BigInteger, nullable=False),
    Column("released_points", BigInteger, nullable=False),
    Column("reversed_points", BigInteger, nullable=False),
    Column(
        "actor",
        Text,
        nullable=False,
        server_default=text("''"),
        comment="The id of the caller's token; empty if access control is off.",
    ),
    PrimaryKeyConstraint("redemption_id", "merchant_id", name="pk_redemptions"),
    UniqueConstraint("reference", "merchant_id", name="uq_redemptions_reference"),
    CheckConstraint("points > 0", name="ck_redemptions_points"),
    CheckConstraint("reversed_points BETWEEN 0 AND points", name="ck_redemptions_reversed_points"),
    CheckConstraint(
        "open_points >= 0 AND released_points >= 0 AND open_points + released_points + reversed_points <= points",
        name="ck_redemptions_held_points",
    ),
    Index("ix_redemptions_redeemer", "redeemer", "merchant_id", "created_at_ms"),
    # The condition holds for every row. Only statements that repeat it can use this index: otherwise a plan made
    # while the table is empty would choose it for any statement that names a merchant.
    Index(
        "ix_redemptions_created",
        "merchant_id",
        "created_at_ms",
        "redemption_id",
        postgresql_where=text("points > 0"),
    ),
    Index("ix_redemptions_open", "settle_by_ms", "merchant_id", postgresql_where=text("open_points > 0")),
)

redemption_reversals = Table(
    "redemption_reversals",
    metadata,
    Column("reference", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("redemption_id", Text, nullable=False),
    Column("points", BigInteger, nullable=False, comment="The points requested; 0 for all that were left."),
    Column("notes", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("redeemer", Text, nullable=False, server_default=text("''"), comment="As in redemptions."),
    Column(
        "reversed_points", BigInteger, nullable=False, server_default=text("0"), comment="The points actually reversed."
    ),
    Column(
        "actor",
        Text,
        nullable=False,
        server_default=text("''"),
        comment="The id of the caller's token; empty if access control is off.",
    ),
    PrimaryKeyConstraint("reference", "merchant_id", name="pk_redemption_reversals"),
    Index("ix_redemption_reversals_redemption", "redemption_id", "merchant_id", "created_at_ms"),
    Index("ix_redemption_reversals_redeemer", "redeemer", "merchant_id", "created_at_ms", "reference"),
)

redemption_refusals = Table(
    "redemption_refusals",
    metadata,
    # Refused calls, deleted after a configured time. They identify customers by id only.
    Column("refusal_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column(
        "customer",
        Text,
        nullable=False,
        comment="The customer of the refused call, in the form of redemptions.redeemer.",
    ),
    Column("at_ms", BigInteger, nullable=False),
    Column("method", Text, nullable=False),
    Column("program_id", BigInteger, nullable=False),
    Column("points", BigInteger, nullable=False),
    Column("active_points", BigInteger, nullable=False),
    Column(
        "reasons",
        JSONB,
        nullable=False,
        comment="[status code or 0, reason, message, values], in the order of the response.",
    ),
    Column("reference", Text, nullable=False, comment="The reference of RedeemPoints; empty for other methods."),
    Column("actor", Text, nullable=False, comment="The id of the caller's token; empty if access control is off."),
    PrimaryKeyConstraint("customer", "merchant_id", "at_ms", "refusal_id", name="pk_redemption_refusals"),
    CheckConstraint("method IN ('VALIDATE', 'ISSUE', 'REDEEM')", name="ck_redemption_refusals_method"),
    Index(
        "ix_redemption_refusals_reference",
        "reference",
        "merchant_id",
        "at_ms",
        "refusal_id",
        postgresql_where=text("reference <> ''"),
    ),
    # The condition holds for every row; only the cleanup statements repeat it.
    Index("ix_redemption_refusals_at", "at_ms", "merchant_id", postgresql_where=text("at_ms > 0")),
)

redemption_audit = Table(
    "redemption_audit",
    metadata,
    # Holds settled or released by operators, or released automatically.
    Column("audit_id", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("redemption_id", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("redeemer", Text, nullable=False, server_default=text("''"), comment="As in redemptions."),
    Column(
        "points",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="The points settled or released; 0 if not recorded.",
    ),
    Column(
        "actor",
        Text,
        nullable=False,
        server_default=text("''"),
        comment="The id of the caller's token; empty if access control is off, and for automatic releases.",
    ),
    PrimaryKeyConstraint("redemption_id", "merchant_id", "audit_id", name="pk_redemption_audit"),
    CheckConstraint("action IN ('SETTLE', 'RELEASE')", name="ck_redemption_audit_action"),
    Index("ix_redemption_audit_redeemer", "redeemer", "merchant_id", "at_ms", "audit_id"),
    Index("ix_redemption_audit_at", "at_ms", "merchant_id", postgresql_where=text("at_ms > 0")),
)
