"""SQL of customers and user groups.

Lock order: a webhook locks its store FOR SHARE, and an erasure locks the store exclusively. Every writer then locks
customers, assigns buyers, locks the contacts that it assigns or releases, assigns identifiers, each in sorted order,
and releases keys last. So no two transactions wait for each other.

The lock of a customer guards all keys and claims of the customer; only a redaction deletes claims of other customers
without it. The lock of a contact guards its owner, and prevents new claims: a claim is only inserted under the lock of
a contact that another customer owns.
"""

import json
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnClause,
    Label,
    ScalarSelect,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.elements import ColumnElement

from pointbook_server.customers.model import (
    CONTACTS,
    BuyerState,
    Customer,
    GroupKey,
    GroupMember,
    Identifier,
    IdentifierKind,
    UserGroup,
    parse_stamp,
)
from pointbook_server.db.database import Row, Statement
from pointbook_server.db.tables import customer_buyers, customer_identifiers, customers, user_group_members, user_groups
from pointbook_server.ledger.model import AccountKey

CUSTOMER = customers.c
IDENTIFIER = customer_identifiers.c
BUYER = customer_buyers.c
GROUP = user_groups.c
MEMBER = user_group_members.c
MERCHANT: BindParameter[Any] = bindparam("merchant_id")
EMPTY_ARRAY: ColumnClause[Any] = literal_column("'[]'::json")
IDENTIFIER_ARRAYS = ", ".join(f"CAST(:{name} AS text[])" for name in ("values", "kinds", "sources", "account_ids"))
IDENTIFIERS = f"unnest({IDENTIFIER_ARRAYS}) AS v (value, kind, source, account_id)"
WRITTEN_IDENTIFIERS = (
    f"unnest({IDENTIFIER_ARRAYS}, CAST(:written AS text[])) AS v (value, kind, source, account_id, written)"
)
BUYERS = "unnest(CAST(:store_ids AS text[]), CAST(:buyer_ids AS text[])) AS v (store_id, buyer_id)"


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


def _arrays(table: Any, *columns: Any) -> ScalarSelect[Any]:
    """Return a subquery that aggregates a customer's rows of a table as a JSON array."""
    aggregated = func.coalesce(func.json_agg(func.json_build_array(*columns)), EMPTY_ARRAY)
    is_of_customer = and_(table.c.customer_id == CUSTOMER.customer_id, table.c.merchant_id == MERCHANT)
    return select(aggregated).where(is_of_customer).correlate(customers).scalar_subquery()


BUYERS_OF_CUSTOMER = _arrays(customer_buyers, BUYER.store_id, BUYER.buyer_id)


def _find(condition: ColumnElement[bool]) -> Statement:
    """Return a statement that reads customers with all their keys."""
    own = _arrays(
        customer_identifiers,
        IDENTIFIER.kind,
        IDENTIFIER.value,
        IDENTIFIER.source,
        IDENTIFIER.account_id,
        func.coalesce(IDENTIFIER.written, ""),
        IDENTIFIER.since_ms,
    ).label("identifiers")
    return Statement(
        select(customers, own, BUYERS_OF_CUSTOMER.label("buyers")).where(condition, CUSTOMER.merchant_id == MERCHANT)
    )


FIND_BY_ID = _find(CUSTOMER.customer_id == bindparam("customer_id"))
FIND_BY_IDS = _find(CUSTOMER.customer_id == any_(bindparam("customer_ids", type_=ARRAY(Text))))
FIND_BY_IDENTIFIER = _find(
    CUSTOMER.customer_id
    == select(IDENTIFIER.customer_id)
    .where(
        IDENTIFIER.value == bindparam("value"),
        IDENTIFIER.kind == bindparam("kind"),
        IDENTIFIER.source == bindparam("source"),
        IDENTIFIER.account_id == bindparam("account_id"),
        IDENTIFIER.merchant_id == MERCHANT,
    )
    .scalar_subquery()
)
FIND_BY_BUYER = _find(
    CUSTOMER.customer_id
    == select(BUYER.customer_id)
    .where(
        BUYER.buyer_id == bindparam("buyer_id"),
        BUYER.store_id == bindparam("store_id"),
        BUYER.merchant_id == MERCHANT,
    )
    .scalar_subquery()
)

LOCK_CUSTOMERS = _statement("""
    SELECT customer_id FROM customers
    WHERE customer_id = ANY(CAST(:customer_ids AS text[])) AND merchant_id = :merchant_id
    ORDER BY customer_id FOR UPDATE
""")
LOCK_UNLOCKED_CUSTOMERS = _statement("""
    SELECT customer_id FROM customers
    WHERE customer_id = ANY(CAST(:customer_ids AS text[])) AND merchant_id = :merchant_id
    ORDER BY customer_id FOR UPDATE SKIP LOCKED
""")
INSERT_CUSTOMER = _statement("""
    INSERT INTO customers
        (customer_id, merchant_id, language, fraud_blocked, revision, created_at_ms, updated_at_ms)
    VALUES (:customer_id, :merchant_id, :language, :fraud_blocked, 1, :now_ms, :now_ms)
    ON CONFLICT DO NOTHING RETURNING 1
""")
UPDATE_CUSTOMER = _statement("""
    UPDATE customers SET
        language = :language, fraud_blocked = :fraud_blocked, revision = revision + 1, updated_at_ms = :now_ms
    WHERE customer_id = :customer_id AND merchant_id = :merchant_id
""")
INCREMENT_CUSTOMER_REVISIONS = _statement("""
    UPDATE customers SET revision = revision + 1, updated_at_ms = :now_ms
    WHERE customer_id = ANY(CAST(:customer_ids AS text[])) AND merchant_id = :merchant_id
""")
# One index look-up for each identifier: OFFSET prevents the planner from merging the subquery into a join.
READ_IDENTIFIER_OWNERS = _statement(f"""
    SELECT i.* FROM {IDENTIFIERS} CROSS JOIN LATERAL (
        SELECT kind, value, source, account_id, customer_id FROM customer_identifiers
        WHERE value = v.value AND kind = v.kind AND source = v.source AND account_id = v.account_id
            AND merchant_id = :merchant_id OFFSET 0
    ) AS i
""")
READ_BUYER_OWNERS = _statement(f"""
    SELECT b.* FROM {BUYERS} CROSS JOIN LATERAL (
        SELECT store_id, buyer_id, customer_id FROM customer_buyers
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND customer_id IS NOT NULL OFFSET 0
    ) AS b
""")
CUSTOMER_OF_OWNER = """
    CROSS JOIN LATERAL (
        SELECT customers.*, (
            SELECT coalesce(json_agg(json_build_array(
                kind, value, source, account_id, coalesce(written, ''), since_ms
            )), '[]'::json)
            FROM customer_identifiers WHERE customer_id = o.customer_id AND merchant_id = :merchant_id
        ) AS identifiers, (
            SELECT coalesce(json_agg(json_build_array(store_id, buyer_id)), '[]'::json)
            FROM customer_buyers WHERE customer_id = o.customer_id AND merchant_id = :merchant_id
        ) AS buyers
        FROM customers WHERE customer_id = o.customer_id AND merchant_id = :merchant_id OFFSET 0
    ) AS c
"""
"""Joins to each owner `o` the customer with all their keys."""
# The customers who have some keys, each after the columns of the key.
FIND_BY_BUYERS = _statement(f"""
    SELECT o.store_id, o.buyer_id, c.* FROM {BUYERS} CROSS JOIN LATERAL (
        SELECT store_id, buyer_id, customer_id FROM customer_buyers
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND customer_id IS NOT NULL OFFSET 0
    ) AS o {CUSTOMER_OF_OWNER}
""")
FIND_BY_IDENTIFIERS = _statement(f"""
    SELECT o.kind, o.value, o.source, o.account_id, c.* FROM {IDENTIFIERS} CROSS JOIN LATERAL (
        SELECT kind, value, source, account_id, customer_id FROM customer_identifiers
        WHERE value = v.value AND kind = v.kind AND source = v.source AND account_id = v.account_id
            AND merchant_id = :merchant_id OFFSET 0
    ) AS o {CUSTOMER_OF_OWNER}
""")
# Locks in the order of the arrays.
LOCK_IDENTIFIERS = _statement(f"""
    SELECT i.* FROM {IDENTIFIERS} CROSS JOIN LATERAL (
        SELECT kind, value, source, account_id FROM customer_identifiers
        WHERE value = v.value AND kind = v.kind AND source = v.source AND account_id = v.account_id
            AND merchant_id = :merchant_id OFFSET 0 FOR UPDATE
    ) AS i
""")
# A conflict raises no error, so that the log of the database never quotes an identifier.
ASSIGN_IDENTIFIERS = _statement(f"""
    INSERT INTO customer_identifiers (value, kind, source, account_id, merchant_id, customer_id, since_ms, written)
    SELECT value, kind, source, account_id, :merchant_id, :customer_id, CAST(:since_ms AS bigint), nullif(written, '')
    FROM {WRITTEN_IDENTIFIERS} ORDER BY value, kind, source, account_id
    ON CONFLICT DO NOTHING RETURNING kind, value, source, account_id
""")
REWRITE_IDENTIFIERS = _statement(f"""
    UPDATE customer_identifiers AS i SET written = nullif(v.written, '') FROM {WRITTEN_IDENTIFIERS}
    WHERE i.value = v.value AND i.kind = v.kind AND i.source = v.source AND i.account_id = v.account_id
        AND i.customer_id = :customer_id AND i.merchant_id = :merchant_id
""")
ASSIGN_BUYERS = _statement(f"""
    INSERT INTO customer_buyers (buyer_id, store_id, merchant_id, customer_id)
    SELECT buyer_id, store_id, :merchant_id, :customer_id FROM {BUYERS} ORDER BY store_id, buyer_id
    ON CONFLICT (buyer_id, store_id, merchant_id) DO UPDATE SET customer_id = excluded.customer_id
    WHERE customer_buyers.customer_id IS NULL RETURNING store_id, buyer_id
""")
RELEASE_IDENTIFIERS = _statement(f"""
    DELETE FROM customer_identifiers AS i USING {IDENTIFIERS}
    WHERE i.value = v.value AND i.kind = v.kind AND i.source = v.source AND i.account_id = v.account_id
        AND i.customer_id = :customer_id AND i.merchant_id = :merchant_id
""")
LOCK_BUYERS = _statement(f"""
    SELECT b.store_id, b.buyer_id, b.customer_id, b.mobile_as_of, b.email_as_of FROM {BUYERS}
    JOIN customer_buyers AS b ON b.buyer_id = v.buyer_id AND b.store_id = v.store_id
    WHERE b.merchant_id = :merchant_id ORDER BY b.store_id, b.buyer_id FOR UPDATE OF b
""")
RELEASE_BUYERS = _statement(f"""
    UPDATE customer_buyers AS b SET customer_id = NULL FROM {BUYERS}
    WHERE b.buyer_id = v.buyer_id AND b.store_id = v.store_id
        AND b.customer_id = :customer_id AND b.merchant_id = :merchant_id
""")
MOVE_IDENTIFIER = _statement("""
    UPDATE customer_identifiers SET customer_id = :to_customer_id, since_ms = :now_ms
    WHERE value = :value AND kind = :kind AND source = :source AND account_id = :account_id
        AND customer_id = :customer_id AND merchant_id = :merchant_id
""")
MOVE_BUYER = _statement("""
    UPDATE customer_buyers SET customer_id = :to_customer_id
    WHERE buyer_id = :buyer_id AND store_id = :store_id
        AND customer_id = :customer_id AND merchant_id = :merchant_id
""")
INSERT_CLAIMS = _statement(f"""
    INSERT INTO customer_claims
        (customer_id, kind, merchant_id, value, store_id, buyer_id, at_ms, rank, event_id, written)
    SELECT :customer_id, kind, :merchant_id, value, :store_id, :buyer_id, :at_ms, :rank, :event_id, nullif(written, '')
    FROM {WRITTEN_IDENTIFIERS}
""")
DELETE_CLAIMS = _statement("""
    DELETE FROM customer_claims
    WHERE customer_id = :customer_id AND kind = ANY(CAST(:kinds AS text[])) AND merchant_id = :merchant_id
""")
# In all stores: the store of a webhook is not signed, so a copy may have arrived for another store.
DELETE_CLAIMS_UNTIL = _statement("""
    DELETE FROM customer_claims
    WHERE buyer_id = ANY(CAST(:buyer_ids AS text[])) AND merchant_id = :merchant_id AND at_ms <= :until_ms
""")
DELETE_CLAIMS_OF_BUYERS = _statement(f"""
    DELETE FROM customer_claims AS c USING {BUYERS}
    WHERE c.customer_id = :customer_id AND c.merchant_id = :merchant_id
        AND c.store_id = v.store_id AND c.buyer_id = v.buyer_id
""")
READ_CLAIMANTS = _statement(f"""
    SELECT v.kind, v.value, v.source, v.account_id, c.customer_id, c.written FROM {IDENTIFIERS} CROSS JOIN LATERAL (
        SELECT customer_id, written FROM customer_claims
        WHERE value = v.value AND kind = v.kind AND merchant_id = :merchant_id
        ORDER BY at_ms DESC, rank DESC, event_id DESC LIMIT 1
    ) AS c
""")
INSERT_AUDIT = _statement("""
    INSERT INTO customer_audit (
        audit_id, merchant_id, customer_id, action, kind, store_id, buyer_id, to_customer_id, reason, at_ms
    ) VALUES (
        :audit_id, :merchant_id, :customer_id, :action, :kind, :store_id, :buyer_id, :to_customer_id, :reason, :at_ms
    )
""")

READ_STORE_OWNER = _statement("SELECT merchant_id FROM stores WHERE store_id = :store_id")
# On Citus, shared locks of a reference table wait for each other, unless the statement also reads a distributed table.
# The condition on the usage always holds.
_OWN_STORES = """
    SELECT store_id FROM stores
    WHERE store_id = ANY(CAST(:store_ids AS text[])) AND merchant_id = :merchant_id
        AND (SELECT count(*) FROM quarantine_usage WHERE merchant_id = :merchant_id) >= 0
"""
# Other merchants' stores are not locked: waiting would reveal that they exist, and delay their owner.
LOCK_STORE_KEYS = _statement(f"{_OWN_STORES} FOR KEY SHARE")
# The lock makes an erasure of the store wait until the webhook has committed, so that it misses nothing.
SHARE_STORES = _statement(f"{_OWN_STORES} FOR SHARE")
# A registered store is not changed.
REGISTER_STORE = _statement("""
    INSERT INTO stores (store_id, merchant_id, shop_domain, display_name, revision, updated_at_ms)
    VALUES (:store_id, :merchant_id, '', '', 1, :now_ms) ON CONFLICT DO NOTHING
""")
READ_BUYER = _statement("""
    SELECT customer_id FROM customer_buyers
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
""")
INSERT_BUYER = _statement("""
    INSERT INTO customer_buyers (buyer_id, store_id, merchant_id) VALUES (:buyer_id, :store_id, :merchant_id)
    ON CONFLICT DO NOTHING
""")
STAMP_BUYER = _statement("""
    UPDATE customer_buyers SET mobile_as_of = :mobile_as_of, email_as_of = :email_as_of
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
""")
# A row without owner and stamps holds no information.
DELETE_EMPTY_BUYER = _statement("""
    DELETE FROM customer_buyers
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
        AND customer_id IS NULL AND mobile_as_of IS NULL AND email_as_of IS NULL
""")
READ_UPDATE = _statement(
    "SELECT content_digest FROM customer_updates WHERE event_id = :event_id AND merchant_id = :merchant_id"
)
INSERT_UPDATE = _statement("""
    INSERT INTO customer_updates
        (event_id, merchant_id, store_id, buyer_id, content_digest, updated_at_ms, is_deletion)
    VALUES (
        :event_id, :merchant_id, :store_id, :buyer_id, :content_digest, :updated_at_ms, CAST(:is_deletion AS boolean)
    )
    ON CONFLICT DO NOTHING RETURNING 1
""")
READ_CONTRADICTION = _statement("""
    SELECT event_id FROM customer_updates
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
        AND updated_at_ms = :updated_at_ms AND is_deletion <> CAST(:is_deletion AS boolean)
    LIMIT 1
""")
READ_NEWEST_UPDATE = _statement(f"""
    SELECT max(u.updated_at_ms) AS updated_at_ms FROM customer_updates AS u JOIN {BUYERS}
    ON u.buyer_id = v.buyer_id AND u.store_id = v.store_id WHERE u.merchant_id = :merchant_id
""")
DELETE_UPDATES = _statement(f"""
    DELETE FROM customer_updates AS u USING {BUYERS}
    WHERE u.buyer_id = v.buyer_id AND u.store_id = v.store_id AND u.merchant_id = :merchant_id
        AND u.updated_at_ms <= :redacted_at_ms
""")
# The erasure of a store also covers buyers that were unknown when it began.
READ_TOMBSTONE = _statement("""
    SELECT greatest(
        (
            SELECT max(redacted_at_ms) FROM customer_tombstones
            WHERE digest = ANY(CAST(:digests AS bytea[])) AND merchant_id = :merchant_id
        ),
        (SELECT max(begun_at_ms) FROM store_erasures WHERE store_id = :store_id AND merchant_id = :merchant_id)
    ) AS redacted_at_ms
""")
# A redacted customer still owns their buyers, which are then not personal data. OFFSET makes every plan look up each
# buyer by itself.
HAS_PERSONAL_DATA = """
    b.store_id = :store_id AND b.merchant_id = :merchant_id AND b.buyer_id > :after AND (
        b.customer_id IS NULL OR b.mobile_as_of IS NOT NULL OR b.email_as_of IS NOT NULL
        OR EXISTS (
            SELECT FROM customer_updates AS u
            WHERE u.buyer_id = b.buyer_id AND u.store_id = b.store_id AND u.merchant_id = :merchant_id OFFSET 0
        )
        OR EXISTS (
            SELECT FROM customer_identifiers AS i
            WHERE i.customer_id = b.customer_id AND i.merchant_id = :merchant_id OFFSET 0
        )
        OR EXISTS (
            SELECT FROM customer_claims AS c
            WHERE c.customer_id = b.customer_id AND c.merchant_id = :merchant_id OFFSET 0
        )
        OR EXISTS (
            SELECT FROM customer_buyers AS other WHERE other.customer_id = b.customer_id
                AND other.merchant_id = :merchant_id AND other.store_id <> b.store_id OFFSET 0
        )
        OR EXISTS (
            SELECT FROM customers AS c
            WHERE c.customer_id = b.customer_id AND c.merchant_id = :merchant_id AND c.language <> '' OFFSET 0
        )
    )
"""
READ_STORE_BUYERS = _statement(f"""
    SELECT b.store_id, b.buyer_id, b.customer_id FROM customer_buyers AS b WHERE {HAS_PERSONAL_DATA}
    ORDER BY b.buyer_id LIMIT :limit
""")
COUNT_STORE_BUYERS = _statement(f"SELECT count(*) AS buyers FROM customer_buyers AS b WHERE {HAS_PERSONAL_DATA}")
WRITE_TOMBSTONES = _statement("""
    INSERT INTO customer_tombstones (digest, merchant_id, redacted_at_ms)
    SELECT digest, :merchant_id, :redacted_at_ms FROM unnest(CAST(:digests AS bytea[])) AS v (digest) ORDER BY digest
    ON CONFLICT (digest, merchant_id) DO UPDATE
    SET redacted_at_ms = greatest(customer_tombstones.redacted_at_ms, excluded.redacted_at_ms)
""")


def _find_group(key: str, condition: ColumnElement[bool]) -> Statement:
    """Return a statement that reads groups with their members and their buyers.

    It is named by the key that the condition finds them by.
    """
    members = (
        select(
            func.json_agg(
                func.json_build_array(
                    MEMBER.customer_id,
                    MEMBER.can_redeem,
                    MEMBER.blocked,
                    MEMBER.is_default,
                    CUSTOMER.fraud_blocked,
                    BUYERS_OF_CUSTOMER,
                )
            )
        )
        .select_from(user_group_members.join(customers))
        .where(MEMBER.group_id == GROUP.group_id, MEMBER.merchant_id == MERCHANT, CUSTOMER.merchant_id == MERCHANT)
        .correlate(user_groups)
        .scalar_subquery()
    )
    labelled: Label[Any] = members.label("members")
    query = select(user_groups, labelled).where(condition, GROUP.merchant_id == MERCHANT)
    return Statement(query, f"customers.find_group_by_{key}")


FIND_GROUP = {
    GroupKey.ID: _find_group("id", GROUP.group_id == bindparam("key")),
    GroupKey.EXTERNAL_ID: _find_group("external_id", GROUP.external_id == bindparam("key")),
    GroupKey.PRIMARY_CUSTOMER: _find_group("primary_customer", GROUP.primary_customer_id == bindparam("key")),
    GroupKey.DEFAULT_OF_CUSTOMER: _find_group(
        "customer",
        GROUP.group_id
        == select(MEMBER.group_id)
        .where(MEMBER.customer_id == bindparam("key"), MEMBER.merchant_id == MERCHANT, MEMBER.is_default)
        .scalar_subquery(),
    ),
}
FIND_GROUPS = _find_group("ids", GROUP.group_id == any_(bindparam("group_ids", type_=ARRAY(Text))))
LOCK_GROUPS = _statement("""
    SELECT group_id FROM user_groups
    WHERE group_id = ANY(CAST(:group_ids AS text[])) AND merchant_id = :merchant_id
    ORDER BY group_id FOR UPDATE
""")
READ_CONFLICTING_GROUPS = _statement("""
    SELECT external_id, primary_customer_id FROM user_groups
    WHERE merchant_id = :merchant_id AND group_id <> :group_id
        AND (external_id = :external_id OR primary_customer_id = :primary_customer_id)
""")
INSERT_GROUP = _statement("""
    INSERT INTO user_groups (group_id, merchant_id, external_id, primary_customer_id, revision, updated_at_ms)
    VALUES (:group_id, :merchant_id, :external_id, :primary_customer_id, :revision, :now_ms)
    ON CONFLICT DO NOTHING RETURNING 1
""")
DELETE_GROUP = _statement("DELETE FROM user_groups WHERE group_id = :group_id AND merchant_id = :merchant_id")
INSERT_MEMBERS = _statement("""
    INSERT INTO user_group_members (customer_id, group_id, merchant_id, can_redeem, blocked, is_default)
    SELECT customer_id, :group_id, :merchant_id, can_redeem, blocked, is_default FROM unnest(
        CAST(:customer_ids AS text[]), CAST(:can_redeem AS boolean[]), CAST(:blocked AS boolean[]),
        CAST(:is_default AS boolean[])
    ) AS v (customer_id, can_redeem, blocked, is_default)
    ON CONFLICT DO NOTHING
""")
CLEAR_OTHER_DEFAULTS = _statement("""
    UPDATE user_group_members SET is_default = false
    WHERE customer_id = ANY(CAST(:customer_ids AS text[])) AND merchant_id = :merchant_id
        AND group_id <> :group_id AND is_default
    RETURNING group_id
""")
# Clearing a default changes those groups, too.
INCREMENT_GROUP_REVISIONS = _statement("""
    UPDATE user_groups SET revision = revision + 1, updated_at_ms = :now_ms
    WHERE group_id = ANY(CAST(:group_ids AS text[])) AND merchant_id = :merchant_id
""")


def read_customer(row: Row) -> Customer:
    """Return the customer of a row, with identifiers and buyers sorted."""
    since_ms = {
        Identifier(IdentifierKind(kind), *columns): since for kind, *columns, since in json.loads(row.identifiers)
    }
    return Customer(
        merchant_id=row.merchant_id,
        customer_id=row.customer_id,
        identifiers=tuple(sorted(since_ms)),
        buyers=_read_buyers(json.loads(row.buyers)),
        language=row.language,
        fraud_blocked=row.fraud_blocked,
        revision=row.revision,
        contacts_since_ms={
            own.kind: since for own, since in since_ms.items() if since and own.kind in CONTACTS and not own.source
        },
    )


def read_group(row: Row) -> UserGroup:
    """Return the user group of a row, with members sorted by id."""
    return UserGroup(
        merchant_id=row.merchant_id,
        group_id=row.group_id,
        external_id=row.external_id or "",
        primary_customer_id=row.primary_customer_id,
        members=tuple(sorted((_read_member(*member) for member in json.loads(row.members)), key=_customer_id)),
        revision=row.revision,
    )


def read_buyer(row: Row) -> tuple[AccountKey, BuyerState]:
    """Return the buyer of a row, and their state."""
    as_of = {IdentifierKind.MOBILE: parse_stamp(row.mobile_as_of), IdentifierKind.EMAIL: parse_stamp(row.email_as_of)}
    return AccountKey(row.store_id, row.buyer_id), BuyerState(row.customer_id, as_of)


def _read_member(*columns: Any) -> GroupMember:
    customer_id, can_redeem, blocked, is_default, fraud_blocked, buyers = columns
    return GroupMember(customer_id, can_redeem, blocked, is_default, fraud_blocked, _read_buyers(buyers))


def _customer_id(member: GroupMember) -> str:
    return member.customer_id


def _read_buyers(pairs: list[list[str]]) -> tuple[AccountKey, ...]:
    return tuple(sorted(AccountKey(*pair) for pair in pairs))
