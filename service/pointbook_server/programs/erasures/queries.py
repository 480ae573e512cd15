"""SQL of store erasures."""

from dataclasses import fields
from typing import Any

from sqlalchemy import BigInteger, Text, and_, bindparam, case, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from pointbook_server.db.database import Row, Statement
from pointbook_server.db.tables import store_erasures, stores
from pointbook_server.programs.erasures.model import ErasurePosition, StoreErasure

ERASURE = store_erasures.c
IS_ERASURE = and_(ERASURE.event_id == bindparam("event"), ERASURE.merchant_id == bindparam("merchant"))
IS_OF_STORE = and_(ERASURE.store_id == bindparam("store"), ERASURE.merchant_id == bindparam("merchant"))
IS_OPEN = ERASURE.closed_at_ms.is_(None)
# The same order as StoreErasure.position.
ORDER = (
    case((IS_OPEN, 0), else_=1),
    case((IS_OPEN, ERASURE.due_at_ms), else_=-ERASURE.closed_at_ms),
    ERASURE.event_id,
)
IS_AFTER_POSITION = tuple_(*ORDER) > tuple_(
    bindparam("after_rank", type_=BigInteger),
    bindparam("after_ms", type_=BigInteger),
    bindparam("after_event", type_=Text),
)

READ_STORE_OWNER = Statement(select(stores.c.merchant_id).where(stores.c.store_id == bindparam("store")))
# Waits for the store's customer webhooks, which lock it FOR SHARE; new accounts only refer to it, and do not wait.
LOCK_STORE = Statement(
    select(stores.c.store_id).where(stores.c.store_id == bindparam("store")).with_for_update(key_share=True)
)
READ_ERASURES = Statement(select(store_erasures).where(IS_OF_STORE))
LOCK_OPEN = Statement(select(store_erasures).where(IS_OF_STORE, IS_OPEN).with_for_update())
INSERT_ERASURE = Statement(
    insert(store_erasures)
    .values({column.name: bindparam(column.name) for column in ERASURE})
    .on_conflict_do_nothing()
    .returning(ERASURE.event_id)
)
UPDATE_ERASURE = Statement(
    update(store_erasures)
    .where(IS_ERASURE)
    .values({name: bindparam(name) for name in ("begun_at_ms", "erased_to", "closed_at_ms", "reason")})
)
COUNT_OPEN = Statement(
    select(
        func.count().label("open"),
        func.count().filter(ERASURE.due_at_ms <= bindparam("now", type_=BigInteger)).label("overdue"),
    ).where(IS_OPEN)
)
LIST_ERASURES = Statement(
    select(store_erasures)
    .where(ERASURE.merchant_id == bindparam("merchant"), IS_AFTER_POSITION)
    .order_by(*ORDER)
    .limit(bindparam("limit"))
)
LIST_ALL_ERASURES = Statement(
    select(store_erasures).where(ERASURE.merchant_id > "", IS_AFTER_POSITION).order_by(*ORDER).limit(bindparam("limit"))
)
_NAMES = [field.name for field in fields(StoreErasure)]


def position_params(after: ErasurePosition) -> dict[str, Any]:
    """Return the parameters of a list that starts after a position."""
    return dict(zip(("after_rank", "after_ms", "after_event"), after, strict=True))


def read_erasure(row: Row) -> StoreErasure:
    """Return the request of a row."""
    values: dict[str, Any] = {name: row[name] for name in _NAMES}
    return StoreErasure(**values)
