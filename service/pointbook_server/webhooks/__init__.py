"""The quarantine: authentic webhooks that could not be applied, until an operator replays or drops them."""
