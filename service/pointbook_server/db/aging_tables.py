"""SQL that finds, deletes and counts old rows, a bounded number at a time.

Each statement reads the index of the table's times, and no other rows than those that it returns or deletes. The limits
are part of the SQL, so that every plan is made for few rows.
"""

from dataclasses import dataclass

from sqlalchemy import TextClause, text

ROWS_FOUND_MAX = 20_000
"""The most rows among which one statement finds merchants.

Each of these merchants then gets a transaction, which must be worth its cost where many merchants have few rows each.
"""
ROWS_IN_BATCH_MAX = 1_000
"""The most rows that one statement deletes."""
BACKLOG_MAX = 10_000
"""The number at which old rows are no longer counted."""


@dataclass(frozen=True, slots=True)
class AgingTable:
    """A table whose rows may be deleted some time after `time`.

    `time` is a column or an expression, in ms. `keys` and `merchant_id` are the primary key. An index of `time` and
    `merchant_id` has the condition `is_indexed`. If that holds for every row, only these statements repeat it, so that
    no other one can use the index.
    """

    name: str
    keys: tuple[str, ...]
    time: str
    is_indexed: str
    is_updated: bool = True
    """Whether the server updates rows. It may not lock those that it never updates, for lack of a privilege."""

    def find_sql(self) -> TextClause:
        """Return a query for the oldest rows before :before_ms, by merchant.

        Its rows are merchants with the times of their first and last row among these.
        """
        return text(f"""
            SELECT merchant_id, min(at_ms) AS from_ms, max(at_ms) AS until_ms FROM (
                SELECT merchant_id, {self.time} AS at_ms FROM {self.name} WHERE {self.time} < :before_ms
                    AND {self.is_indexed} ORDER BY {self.time} LIMIT {ROWS_FOUND_MAX}
            ) AS old
            GROUP BY merchant_id
        """)  # noqa: S608 - only our own names

    def delete_sql(self, *, returning: str = "1") -> TextClause:
        """Return a deletion of a merchant's rows between :from_ms and :until_ms.

        The rows are chosen once, in a CTE: a join may run a subquery again, which then finds further rows beyond its
        limit.
        """
        lock = "FOR UPDATE SKIP LOCKED" if self.is_updated else ""
        is_same = " AND ".join(f"t.{key} = old.{key}" for key in self.keys)
        return text(f"""
            WITH old AS MATERIALIZED (
                SELECT {", ".join(self.keys)} FROM {self.name}
                WHERE merchant_id = :merchant_id AND {self.time} BETWEEN :from_ms AND :until_ms AND {self.is_indexed}
                ORDER BY {self.time} LIMIT {ROWS_IN_BATCH_MAX} {lock}
            )
            DELETE FROM {self.name} AS t USING old
            WHERE t.merchant_id = :merchant_id AND {is_same}
            RETURNING {returning}
        """)  # noqa: S608 - only our own names

    def count_sql(self) -> TextClause:
        """Return a count of the rows before :before_ms, up to BACKLOG_MAX."""
        return text(f"""
            SELECT count(*) AS count FROM (
                SELECT merchant_id FROM {self.name} WHERE {self.time} < :before_ms AND {self.is_indexed}
                LIMIT {BACKLOG_MAX}
            ) AS old
        """)  # noqa: S608 - only our own names
