"""Database access: connections, transactions, tables and migrations."""
