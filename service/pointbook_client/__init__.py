"""The Python client of Pointbook."""
