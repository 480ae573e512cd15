"""The quarantine: authentic webhooks that could not be applied."""
