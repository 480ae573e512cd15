"""The `pointbook` command."""
