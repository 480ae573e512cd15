"""Support: refused calls, and the timeline of a customer."""
