"""One-time codes that prove that it is the customer."""
