"""The ways in which one-time codes reach customers."""
