"""Benefits: the catalogue of what memberships give, when it is issued, and whether it applies."""
