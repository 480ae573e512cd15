"""Delivery of one-time codes by SMS and e-mail providers."""
