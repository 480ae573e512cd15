"""Stores and loyalty programs."""
