"""Whether a customer may redeem points now."""
