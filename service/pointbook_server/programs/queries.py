"""SQL of stores and programs."""

import json
from dataclasses import asdict
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    select,
    text,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY

from pointbook_server.db.database import Row, Statement
from pointbook_server.db.row_writes import insert_row, update_row
from pointbook_server.db.tables import (
    benefits,
    customer_buyers,
    points_accounts,
    programs,
    quarantine_usage,
    store_erasures,
    stores,
)
from pointbook_server.programs.model import Channel, Criteria, PhoneNumberType, Program, Store, ValidationSettings

IS_STORE = and_(stores.c.store_id == bindparam("store"), stores.c.merchant_id == bindparam("merchant"))
IS_PROGRAM = and_(programs.c.merchant_id == bindparam("merchant"), programs.c.program_id == bindparam("program"))
WRITTEN_SEPARATELY = {"last_webhook_at_ms"}
INSERT_STORE = Statement(insert_row(stores, WRITTEN_SEPARATELY))
UPDATE_STORE = Statement(update_row(stores, IS_STORE, WRITTEN_SEPARATELY))
LOCK_STORE = Statement(select(stores).where(IS_STORE).with_for_update())
READ_STORE = Statement(select(stores).where(IS_STORE))
READ_STORE_OWNER = Statement(select(stores.c.merchant_id).where(stores.c.store_id == bindparam("store")))
LIST_STORES = Statement(
    select(stores)
    .where(stores.c.merchant_id == bindparam("merchant"), stores.c.store_id > bindparam("after"))
    .order_by(stores.c.store_id)
    .limit(bindparam("limit"))
)
WRITE_WEBHOOK_TIMES = Statement(
    text("""
        UPDATE stores SET last_webhook_at_ms = v.at_ms
        FROM unnest(CAST(:store_ids AS text[]), CAST(:merchant_ids AS text[]), CAST(:at_ms AS bigint[]))
            AS v (store_id, merchant_id, at_ms)
        WHERE stores.store_id = v.store_id AND stores.merchant_id = v.merchant_id
            AND v.at_ms > coalesce(stores.last_webhook_at_ms, 0)
    """)
)
LIST_SILENT_STORES = Statement(
    select(stores.c.merchant_id, stores.c.store_id, stores.c.last_webhook_at_ms)
    .where(stores.c.last_webhook_at_ms > bindparam("since_ms"))
    .order_by(stores.c.last_webhook_at_ms, stores.c.store_id)
    .limit(bindparam("limit"))
)
READ_WEBHOOK_TIMES = Statement(
    select(stores.c.merchant_id, stores.c.store_id, stores.c.updated_at_ms, stores.c.last_webhook_at_ms).order_by(
        stores.c.merchant_id, stores.c.store_id
    )
)
MERCHANT: BindParameter[Any] = bindparam("merchant")
_OWN_STORES = select(stores.c.store_id).where(
    stores.c.merchant_id == MERCHANT,
    stores.c.store_id == any_(bindparam("stores", type_=ARRAY(Text))),
)
READ_OWN_STORES = Statement(_OWN_STORES)
# The lock prevents the release of stores that this transaction refers to, until it commits. On Citus, shared locks of a
# reference table wait for each other, unless the statement also reads a distributed table. The condition always holds.
_USAGE_ROWS = select(func.count()).select_from(quarantine_usage).where(quarantine_usage.c.merchant_id == MERCHANT)
SHARE_STORES = Statement(
    _OWN_STORES.where(_USAGE_ROWS.scalar_subquery() >= 0).with_for_update(read=True, key_share=True)
)
# Accounts have no index by store, so this reads all of the merchant's accounts if nothing else uses the store.
READ_USES = Statement(
    union_all(
        *(
            select(literal(table.name).label("used_by")).where(
                exists().where(is_used, table.c.merchant_id == bindparam("merchant"))
            )
            for table, is_used in (
                (store_erasures, store_erasures.c.store_id == bindparam("store")),
                (customer_buyers, customer_buyers.c.store_id == bindparam("store")),
                (programs, bindparam("store") == any_(programs.c.store_ids)),
                (benefits, bindparam("store") == any_(benefits.c.store_ids)),
                (points_accounts, points_accounts.c.store_id == bindparam("store")),
            )
        )
    ).limit(1)
)
DELETE_STORE = Statement(delete(stores).where(IS_STORE))
INSERT_PROGRAM = Statement(insert_row(programs))
UPDATE_PROGRAM = Statement(update_row(programs, IS_PROGRAM))
READ_PROGRAM = Statement(select(programs).where(IS_PROGRAM))
READ_PROGRAMS = Statement(
    select(programs).where(
        programs.c.program_id == any_(bindparam("program_ids", type_=ARRAY(BigInteger))),
        programs.c.merchant_id == bindparam("merchant"),
    )
)
READ_CROSS_PROGRAM = Statement(
    select(programs)
    .where(programs.c.merchant_id == bindparam("merchant"), programs.c.allow_cross_program_redemption)
    .order_by(programs.c.program_id)
)
LOCK_PROGRAM = Statement(select(programs).where(IS_PROGRAM).with_for_update())
LIST_PROGRAMS = Statement(
    select(programs)
    .where(programs.c.merchant_id == bindparam("merchant"), programs.c.program_id > bindparam("after"))
    .order_by(programs.c.program_id)
    .limit(bindparam("limit"))
)


def read_store(row: Row) -> Store:
    """Return the store of a row."""
    return Store(row.merchant_id, row.store_id, row.shop_domain, row.display_name)


def program_columns(program: Program) -> dict[str, Any]:
    """Return the columns of a program, except revision and time."""
    criteria = {name: points for name, points in asdict(program.criteria).items() if points is not None}
    validation = json.dumps(asdict(program.validation))
    return {**asdict(program), "criteria": json.dumps(criteria), "validation": validation}


def read_program(row: Row) -> Program:
    """Return the program of a row."""
    return Program(
        merchant_id=row.merchant_id,
        program_id=row.program_id,
        store_ids=tuple(row.store_ids),
        display_name=row.display_name,
        redemption_enabled=row.redemption_enabled,
        time_zone=row.time_zone,
        default_region=row.default_region,
        allowed_regions=tuple(row.allowed_regions),
        criteria=Criteria(**json.loads(row.criteria)),
        point_value=row.point_value,
        currency_code=row.currency_code,
        local_currency_code=row.local_currency_code,
        local_currency_rate=row.local_currency_rate,
        local_currency_decimals=row.local_currency_decimals,
        allow_group_redemption=row.allow_group_redemption,
        allow_cross_program_redemption=row.allow_cross_program_redemption,
        settlement_window_ms=row.settlement_window_ms,
        settlement_lead_ms=row.settlement_lead_ms,
        settlement_scenes=tuple(row.settlement_scenes),
        validation=_read_validation(json.loads(row.validation)),
    )


def _read_validation(values: dict[str, Any]) -> ValidationSettings:
    """Return validation settings; a row of an earlier release lacks newer fields."""
    channels = tuple(map(Channel, values["channels"]))
    sms_number_types = tuple(map(PhoneNumberType, values.get("sms_number_types", ())))
    return ValidationSettings(**{**values, "channels": channels, "sms_number_types": sms_number_types})
