"""The quarantine: authentic webhooks that could not be applied, until an operator has replayed or dropped them."""
