"""Capillary's status codes of redemption.

The numbers are in the table of reasons, `pointbook_server.reasons.REASONS`.
Source: docs/reference/capillary-isredeemable.md#status-codes
"""

from pointbook_server.reasons import REASONS

STATUS_CODES = {reason: spec.status_code for reason, spec in REASONS.items() if spec.status_code is not None}
"""The status code of each reason that a redemption can have."""
