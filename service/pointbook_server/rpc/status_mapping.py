"""Errors as gRPC statuses with rich details (google.rpc.Status)."""

import asyncio
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import REASONS, Reason, Retry
from pointbook_server.rpc.headers import PREVIOUS_ATTEMPTS_HEADER, REQUEST_ID_HEADER, previous_attempts

DOMAIN = "pointbook"
VIOLATIONS_MAX = 50
DETAILS_BYTES_MAX = 3_000
"""Leaves space for the message and the encoding: a status over 4 KiB can be lost on its way to the client."""
TEXT_LENGTH_MAX = 200
METADATA_BYTES_MAX = 1_000
"""Fits the longest value: the names of all violations of a redemption."""
PUSHBACK_HEADER = "grpc-retry-pushback-ms"
"""The trailing metadata that the retry policy of every gRPC library obeys: a delay before the next attempt, or -1 for
no further attempt. Source: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
"""
NO_RETRY = ((PUSHBACK_HEADER, "-1"),)
PUSHBACK_SECONDS_MAX = 2.0
"""The longest delay that is left to a client's policy: the longest of its own, in deploy/client/service-config.json. A
caller learns the reason of a longer one, and decides itself.
"""
ATTEMPT_SECONDS = 0.5
"""How long an attempt takes at most as a rule: the objective of 99 % of the calls. A call without that much time after
the delay would end at its deadline, and its caller would not learn the reason.
"""
_RETRIED = frozenset({Retry.SOON, Retry.LATER})
_GRPC_CODES = {reason: grpc.StatusCode[spec.grpc_code] for reason, spec in REASONS.items()}


def grpc_code(reason: Reason) -> grpc.StatusCode:
    """Return the gRPC status code of a reason."""
    return _GRPC_CODES[reason]


async def abort(context: Any, error: PointbookError, request_id: str) -> NoReturn:
    """End a call with an error.

    Raises AbortError, or CancelledError if the caller has disconnected.
    """
    status = rpc_status.to_status(to_status(error))
    pushback = retry_pushback(error, context.time_remaining())
    trailing_metadata = (*status.trailing_metadata, *pushback, (REQUEST_ID_HEADER, request_id))
    if count := previous_attempts(context.invocation_metadata()):
        # One of them may still be running, so this error does not prove that the call has no effect.
        trailing_metadata = (*trailing_metadata, (PREVIOUS_ATTEMPTS_HEADER, str(count)))
    try:
        await context.abort(status.code, status.details, trailing_metadata=trailing_metadata)
    except grpc.aio.InternalError:
        # The caller has just disconnected, usually at its own deadline; gRPC must not log that as an error.
        raise asyncio.CancelledError from None
    raise AssertionError("gRPC's abort has not raised")


def retry_pushback(error: PointbookError, remaining_seconds: float | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata that tell a client's retry policy when to repeat a call.

    They are empty if a retry helps at any time, so that the client's own backoff applies. `remaining_seconds` is the
    time until the caller's deadline, None without one.
    """
    if REASONS[error.reason].retry not in _RETRIED or error.reason is Reason.DEADLINE_EXCEEDED:
        return NO_RETRY
    if not error.retry_after_seconds:
        return ()
    is_too_late = remaining_seconds is not None and error.retry_after_seconds + ATTEMPT_SECONDS > remaining_seconds
    if is_too_late or error.retry_after_seconds > PUSHBACK_SECONDS_MAX:
        return NO_RETRY
    return ((PUSHBACK_HEADER, str(_delay_ms(error.retry_after_seconds))),)


def to_status(error: PointbookError) -> Status:
    """Convert an error to google.rpc.Status.

    Texts and details are shortened so that clients receive it whole.
    """
    status = Status(code=grpc_code(error.reason).value[0], message=error.message[:TEXT_LENGTH_MAX])
    info = ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = value.encode()[:METADATA_BYTES_MAX].decode(errors="ignore")
    bad_request = _bad_request(error, DETAILS_BYTES_MAX - info.ByteSize())
    omitted = len(error.violations) - len(bad_request.field_violations)
    if omitted:
        info.metadata["omitted_violations"] = str(omitted)
    _add_detail(status, info)
    if error.violations:
        _add_detail(status, bad_request)
    if error.retry_after_seconds is not None:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(_delay_ms(error.retry_after_seconds))
        _add_detail(status, retry)
    if resource := REASONS[error.reason].resource:
        name = info.metadata[resource.metadata_key]
        _add_detail(status, ResourceInfo(resource_type=resource.type, resource_name=name))
    return status


def _delay_ms(seconds: float) -> int:
    """Return a delay in milliseconds.

    Rounded, because 1.001 s is slightly less than 1,001 ms as a float and the delay must not be too short.
    """
    return round(seconds * 1_000)


def _bad_request(error: PointbookError, bytes_max: int) -> BadRequest:
    """Return as many of an error's violations as fit."""
    bad_request = BadRequest()
    for violation in error.violations[:VIOLATIONS_MAX]:
        bad_request.field_violations.add(
            field=violation.field[:TEXT_LENGTH_MAX], description=violation.description[:TEXT_LENGTH_MAX]
        )
        if bad_request.ByteSize() > bytes_max:
            del bad_request.field_violations[-1]
            break
    return bad_request


def _add_detail(status: Status, detail: Message) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
