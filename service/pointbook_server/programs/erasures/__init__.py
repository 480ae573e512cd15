"""Requests to erase the personal data of a store's customers."""
