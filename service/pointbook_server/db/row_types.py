"""Rows as parameters: arrays of composite types of the database (decision 0064)."""

from collections.abc import Mapping

RowTypes = Mapping[str, Mapping[str, str]]
"""The database's types of rows, with their columns and types in order."""


def rows_of(row_type: str) -> str:
    """Return a FROM item `v` with the rows of a parameter.

    The parameter is named like the type of its rows.
    """
    return f"unnest(CAST(:{row_type} AS {row_type}[])) AS v"
