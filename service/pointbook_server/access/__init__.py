"""Tokens, scopes, and the merchants that a caller may name."""
