"""The points ledger: accounts, entries, and the fold of entries to accounts."""
