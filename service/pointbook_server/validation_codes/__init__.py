"""One-time codes and missed calls that prove a customer's identity."""
