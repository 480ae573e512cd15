"""Customers, what they are found by, and the groups in which they pool points."""
