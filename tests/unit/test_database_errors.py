"""Errors of the driver, translated into those of the server."""

import asyncpg
import pytest

from pointbook_server.db.errors import STORE_KEYS, RetryTransactionError, database_errors
from pointbook_server.errors import DatabaseDefectError


def foreign_key_error(constraint: str) -> asyncpg.PostgresError:
    """Return the driver's error for a row whose key refers to nothing."""
    error = asyncpg.ForeignKeyViolationError("no such key")
    error.constraint_name = constraint
    return error


@pytest.mark.parametrize("constraint", sorted(STORE_KEYS))
@pytest.mark.parametrize("suffix", ["", "_102008"], ids=["PostgreSQL", "shard of Citus"])
def test_reference_to_a_released_store_is_tried_again(constraint: str, suffix: str) -> None:
    """Citus appends a number to the names of the constraints of each shard."""
    with pytest.raises(RetryTransactionError), database_errors():
        raise foreign_key_error(constraint + suffix)


def test_other_foreign_keys_are_defects() -> None:
    with pytest.raises(DatabaseDefectError) as caught, database_errors():
        raise foreign_key_error("fk_customer_buyers_customers_102008")

    assert caught.value.constraint == "fk_customer_buyers_customers"
