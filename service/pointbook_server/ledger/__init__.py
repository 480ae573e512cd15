"""The points book: accounts, entries, and the fold that makes one of the other."""
