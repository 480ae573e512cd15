"""The Python client of Pointbook, which keeps the loyalty points of a shop group.

`connect` returns a client for asyncio, and `pointbook_client.sync.connect` one for threads.
"""

from pointbook_client.client import PendingCall, PointbookClient, connect
from pointbook_client.errors import (
    AbortedError,
    AlreadyExistsError,
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PointbookError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from pointbook_client.identity import Buyer, CustomerRef
from pointbook_client.models import (
    CustomerPoints,
    ExpiringPoints,
    IssuedCode,
    PointsAccount,
    PointsEntry,
    PointsExpiry,
    PointsLot,
    PointsUpdateType,
    Redemption,
    RedemptionDraw,
    RedemptionReversal,
    RedemptionState,
    RedemptionStatus,
    Validation,
    ValidationType,
)
from pointbook_client.requests import new_reference
from pointbook_client.tls import CredentialsSource, Tls

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "Buyer",
    "CallCancelledError",
    "CredentialsSource",
    "CustomerPoints",
    "CustomerRef",
    "DeadlineExceededError",
    "ExpiringPoints",
    "FailedPreconditionError",
    "FieldViolation",
    "InternalError",
    "InvalidArgumentError",
    "IssuedCode",
    "NotFoundError",
    "PendingCall",
    "PermissionDeniedError",
    "PointbookClient",
    "PointbookError",
    "PointsAccount",
    "PointsEntry",
    "PointsExpiry",
    "PointsLot",
    "PointsUpdateType",
    "Redemption",
    "RedemptionDraw",
    "RedemptionReversal",
    "RedemptionState",
    "RedemptionStatus",
    "ResourceExhaustedError",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "Validation",
    "ValidationType",
    "connect",
    "new_reference",
]
