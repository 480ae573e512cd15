"""Customers, their identifiers, and user groups."""
