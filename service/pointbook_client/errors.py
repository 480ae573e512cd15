"""The errors of calls, with what the server says about them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

DOMAIN = "pointbook"
REQUEST_ID_KEY = "x-request-id"
PREVIOUS_ATTEMPTS_KEY = "x-previous-attempts"
"""How often the call was sent before, if gRPC or a balancer has repeated it."""
_STATUS_KEY = "grpc-status-details-bin"
_CERTAIN_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
"""The codes of reasons for which the server has refused a call, without any effect."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A wrong field of a request.

    `field` is its path, such as `customer.mobile`, or empty for the whole request, and `description` the rule that it
    breaks.
    """

    field: str
    description: str


class PointbookError(grpc.RpcError):
    """A call that failed.

    There is a subclass for each gRPC code, such as NotFoundError, and for each reason, such as
    `reasons.InsufficientPointsError`. An error of a newer server, or of the connection, is of its code's class.

    >>> error = PointbookError(grpc.StatusCode.NOT_FOUND, "No customer has this identifier.")
    >>> str(error)
    'NOT_FOUND: No customer has this identifier.'
    """

    def __init__(
        self,
        grpc_code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
        violations: Sequence[FieldViolation] = (),
        request_id: str = "",
        retry_delay: timedelta | None = None,
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        super().__init__(grpc_code, message)
        self.grpc_code = grpc_code
        self.message = message
        self.reason = reason
        """The ErrorReason without its prefix; empty if the connection failed or the server sent no reason."""
        self.metadata = dict(metadata)
        """The values that led to the error, such as `active_points`. None identifies a person."""
        self.violations = tuple(violations)
        """The wrong fields of an INVALID_FIELDS error."""
        self.request_id = request_id
        """The id of the call in the log of a server that it has reached."""
        self.retry_delay = retry_delay
        """The time to wait before the same call can succeed, if the server knows one."""
        self._trailing_metadata = tuple(trailing_metadata)
        was_repeated = any(key == PREVIOUS_ATTEMPTS_KEY for key, _ in self._trailing_metadata)
        # A proxy refuses calls too, but does not count earlier attempts.
        self.outcome_unknown = was_repeated or not reason or grpc_code not in _CERTAIN_CODES
        """Whether the call may have changed something, or still may, although it failed.

        Send the same call again, with the same reference or event id, to find out. A refusal is no proof if an
        earlier attempt of the call was cut off, as the server may still carry that one out.
        """

    @property
    def status_code(self) -> int | None:
        """The status code of a refused redemption, such as 803, or None."""
        code = self.metadata.get("status_code", "")
        return int(code) if code.isdecimal() else None

    def code(self) -> grpc.StatusCode:
        """Return the gRPC code, as errors of grpcio do."""
        return self.grpc_code

    def details(self) -> str:
        """Return the message, as errors of grpcio do."""
        return self.message

    def trailing_metadata(self) -> tuple[Any, ...]:
        """Return the trailing metadata of the call, as errors of grpcio do."""
        return self._trailing_metadata

    def __str__(self) -> str:
        cause = ": ".join(part for part in (self.grpc_code.name, self.reason, self.message) if part)
        fields = "; ".join(": ".join(filter(None, (each.field, each.description))) for each in self.violations)
        request = f"request {self.request_id}" if self.request_id else ""
        return " ".join([cause, *(f"({part})" for part in (fields, request) if part)])


class InvalidArgumentError(PointbookError):
    """The request must change."""


class UnauthenticatedError(PointbookError):
    """The token is missing, unknown, revoked or expired."""


class PermissionDeniedError(PointbookError):
    """The token does not allow the call."""


class NotFoundError(PointbookError):
    """The server has no such resource."""


class AlreadyExistsError(PointbookError):
    """The id, reference or identifier belongs to something else."""


class FailedPreconditionError(PointbookError):
    """The call is refused, such as a redemption without enough points."""


class AbortedError(PointbookError):
    """The call conflicted with another one, and changed nothing."""


class ResourceExhaustedError(PointbookError):
    """A limit is reached: of the server, the token, or messages to a customer."""


class UnavailableError(PointbookError):
    """The server could not be reached, or cannot answer now."""


class DeadlineExceededError(PointbookError):
    """The call did not end in time; its outcome is unknown."""


class InternalError(PointbookError):
    """The server failed; its log has the cause under the request id."""


class CallCancelledError(PointbookError):
    """The call was cancelled, by the caller or by an overloaded server."""


BY_CODE: Mapping[grpc.StatusCode, type[PointbookError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
        grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
        grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
        grpc.StatusCode.ABORTED: AbortedError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        grpc.StatusCode.INTERNAL: InternalError,
        grpc.StatusCode.CANCELLED: CallCancelledError,
    }
)
"""The exception of each gRPC code; PointbookError for the others."""


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """The rich details of an error; empty where the server sent none."""

    info: ErrorInfo
    violations: tuple[FieldViolation, ...]
    retry_delay: timedelta | None


NO_DETAILS = ErrorDetails(ErrorInfo(), (), None)


def read_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> ErrorDetails:
    """Return the details in the trailing metadata of a call.

    Details that cannot be read, or are those of a proxy, count as missing: the code and the message remain.
    """
    serialized = next((value for key, value in trailing_metadata if key == _STATUS_KEY), b"")
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    try:
        status = Status.FromString(serialized if isinstance(serialized, bytes) else serialized.encode())
        for packed in status.details:
            _ = packed.Unpack(info) or packed.Unpack(bad_request) or packed.Unpack(retry)
        delay = retry.retry_delay.ToTimedelta() if retry.HasField("retry_delay") else None
    except (DecodeError, OverflowError, ValueError):
        return NO_DETAILS
    violations = tuple(FieldViolation(item.field, item.description) for item in bad_request.field_violations)
    return ErrorDetails(info, violations, delay) if info.domain == DOMAIN else replace(NO_DETAILS, retry_delay=delay)
