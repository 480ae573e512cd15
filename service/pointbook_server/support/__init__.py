"""What support staff read of the past: refused calls and the customer timeline."""
