"""Redemption: validating, redeeming, reversing and settling points."""
