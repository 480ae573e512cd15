"""The outermost interceptor: every call gets a request id, a deadline, and our errors as rich gRPC statuses."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from typing import Any

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pointbook_server.access.model import current_principal
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.logs import current_call
from pointbook_server.rpc.refusal_limits import Pacer, RefusalLog

DOMAIN = "pointbook"
VIOLATIONS_MAX = 50
DETAILS_BYTES_MAX = 3_000
"""Room for the message and the encoding: a status over 4 KiB can be lost on its way to the client."""
TEXT_LENGTH_MAX = 200
METADATA_BYTES_MAX = 1_000
"""Room for the longest value there is: the names of everything that speaks against a redemption."""
RETRY_AFTER_SECONDS = 1.0
REQUEST_ID_HEADER = "x-request-id"
CODES = {
    Reason.INVALID_FIELDS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOKEN_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOKEN_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOKEN_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.SCOPE_MISSING: grpc.StatusCode.PERMISSION_DENIED,
    Reason.MERCHANT_FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Reason.STORE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.PROGRAM_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.CUSTOMER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.GROUP_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.ENTRY_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.WEBHOOK_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.BENEFIT_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.CUSTOM_PRIVILEGE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REDEMPTION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REFERENCE_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Reason.EVENT_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Reason.IDENTIFIER_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.STORE_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.STORE_UNPROVEN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STORE_IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_ETAG: grpc.StatusCode.ABORTED,
    Reason.TRANSACTION_CONFLICT: grpc.StatusCode.ABORTED,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DATABASE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.CODE_KEY_UNKNOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.CLOCK_WRONG: grpc.StatusCode.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    Reason.POINTS_NOT_POSITIVE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.IDENTIFIER_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.DELIVERY_FAILED: grpc.StatusCode.UNAVAILABLE,
    Reason.SEND_LIMIT_REACHED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOKEN_LIMIT_REACHED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""The gRPC code of every reason; those that are not named here are FAILED_PRECONDITION.

UNAVAILABLE is only for what may have passed within seconds, since standard retry policies repeat the call then.
"""


class Retry(StrEnum):
    """Whether the same call can succeed when it is repeated."""

    SOON = "yes, soon"
    LATER = "yes, later (RetryInfo)"
    STATE = "no, until the state has changed"
    REQUEST = "no, the request must change"
    OPERATOR = "no, an operator must act"
    NO_ERROR = "no error"


RETRIES_OF_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: Retry.REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: Retry.OPERATOR,
    grpc.StatusCode.PERMISSION_DENIED: Retry.OPERATOR,
    grpc.StatusCode.NOT_FOUND: Retry.STATE,
    grpc.StatusCode.ALREADY_EXISTS: Retry.REQUEST,
    grpc.StatusCode.FAILED_PRECONDITION: Retry.STATE,
    grpc.StatusCode.ABORTED: Retry.SOON,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Retry.SOON,
    grpc.StatusCode.UNAVAILABLE: Retry.SOON,
    grpc.StatusCode.DEADLINE_EXCEEDED: Retry.SOON,
    grpc.StatusCode.INTERNAL: Retry.OPERATOR,
}
RETRIES = {
    Reason.REDEMPTION_FAILED: Retry.SOON,
    Reason.CONTACT_CHANGED: Retry.LATER,
    Reason.SEND_LIMIT_REACHED: Retry.LATER,
    Reason.TOKEN_LIMIT_REACHED: Retry.LATER,
    Reason.TOKEN_MISSING: Retry.REQUEST,
    Reason.STALE_ETAG: Retry.REQUEST,
    Reason.NOT_A_MULTIPLE: Retry.REQUEST,
    Reason.CODE_INVALID: Retry.REQUEST,
    Reason.ABOVE_MAX_PER_REDEMPTION: Retry.REQUEST,
    Reason.BELOW_MIN_PER_REDEMPTION: Retry.REQUEST,
    Reason.ABOVE_MAX_PER_MISSED_CALL: Retry.REQUEST,
    Reason.MISSED_CALL_NOT_ENABLED: Retry.REQUEST,
    Reason.VALIDATION_REQUIRED: Retry.REQUEST,
    Reason.SKIP_NOT_ALLOWED: Retry.REQUEST,
    Reason.GROUP_REDEMPTION_NOT_ALLOWED: Retry.REQUEST,
    Reason.CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED: Retry.REQUEST,
    Reason.CHANNEL_NOT_ENABLED: Retry.REQUEST,
    Reason.ALREADY_REVERSED: Retry.REQUEST,
    Reason.REDEMPTION_SETTLED: Retry.REQUEST,
    Reason.KEY_NOT_CONFIGURED: Retry.OPERATOR,
    Reason.STORE_UNPROVEN: Retry.OPERATOR,
    Reason.CROSS_PROGRAM_MISCONFIGURED: Retry.OPERATOR,
    Reason.REDEEMABLE: Retry.NO_ERROR,
    Reason.CODE_NOT_ISSUED: Retry.NO_ERROR,
}
"""Whether a repetition helps against a reason that differs in this from the others of its gRPC code."""
RESOURCES = {
    Reason.STORE_NOT_FOUND: ("pointbook.v1.Store", "store_id"),
    Reason.PROGRAM_NOT_FOUND: ("pointbook.v1.Program", "program_id"),
    Reason.GROUP_NOT_FOUND: ("pointbook.v1.UserGroup", "group_id"),
    Reason.ENTRY_NOT_FOUND: ("pointbook.v1.PointsEntry", "event_id"),
    Reason.BENEFIT_NOT_FOUND: ("pointbook.v1.Benefit", "benefit_id"),
    Reason.CUSTOM_PRIVILEGE_NOT_FOUND: ("pointbook.v1.CustomPrivilege", "privilege_id"),
    Reason.REDEMPTION_NOT_FOUND: ("pointbook.v1.Redemption", "redemption_id"),
    Reason.WEBHOOK_NOT_FOUND: ("pointbook.v1.QuarantinedWebhook", "quarantine_id"),
}
"""The resource that a reason is about, and the metadata that names it."""
PACED_CODES = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""The refusals of unknown callers, who can repeat them at will: bad tokens, and those for which no look-up has room."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger()


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call of ours, and knows which of them have not ended."""

    def __init__(self, *, deadline_seconds: float, refusals: RefusalLog, pacer: Pacer) -> None:
        self._deadline_seconds = deadline_seconds
        self._refusals = refusals
        self._pacer = pacer
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler, once for all its calls; one that refuses a call serves that call alone.

        It gets the call's metadata in place of the requests, which it reads from the context: gRPC builds the metadata
        anew each time it is asked for, and this interceptor has asked already. Health and reflection pass: they stream
        answers, and have statuses of their own.
        """
        wrapped = self._handlers.get(handler_call_details.method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or handler.response_streaming:
            return handler
        wrapped = grpc.stream_unary_rpc_method_handler(
            self._wrap(handler.stream_unary, handler_call_details.method),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )
        if handler.response_serializer is not None:
            self._handlers[handler_call_details.method] = wrapped
        return wrapped

    async def drain(self) -> None:
        """Wait until the running calls have ended, their cleaning up included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _wrap(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], method: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(_requests: object, context: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None, "gRPC runs every call in a task of its own"  # noqa: S101 - narrows
            self._tasks.add(task)
            metadata = context.invocation_metadata()
            request_id = request_id_of(metadata)
            current_call.set({"request_id": request_id, "method": method})
            try:
                return await self._answer(behaviour, metadata, context)
            except PointbookError as error:
                if current_principal.get(None) is None and code_of(error.reason) in PACED_CODES:
                    await self._pacer.wait()
                await abort(context, error, request_id, self._refusals)
            except asyncio.CancelledError:
                if task.cancelling():
                    raise
                # Nobody cancelled this call, so its client still waits for a status.
                log.exception("stray cancellation")
                await abort(context, _internal(request_id), request_id, self._refusals)
            except Exception:
                log.exception("internal error")
                await abort(context, _internal(request_id), request_id, self._refusals)
            finally:
                self._tasks.discard(task)

        return call

    async def _answer(self, behaviour: Callable[[Any, Any], Awaitable[Any]], metadata: Any, context: Any) -> Any:
        remaining = context.time_remaining()
        seconds = self._deadline_seconds if remaining is None else min(remaining, self._deadline_seconds)
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await behaviour(metadata, context)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise PointbookError(Reason.DEADLINE_EXCEEDED, "The call ran into its deadline.") from None


def request_id_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Take the caller's request id where it is harmless to log, or make one."""
    for key, value in metadata or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{random.getrandbits(64):016x}"


def _internal(request_id: str) -> PointbookError:
    return PointbookError(
        Reason.INTERNAL,
        "Something broke on our side; the log has the cause under the request id.",
        metadata={"request_id": request_id},
    )


async def abort(context: Any, error: PointbookError, request_id: str, refusals: RefusalLog) -> None:
    """End a call with an error of ours, and log that where its caller was there to be refused."""
    status = rpc_status.to_status(to_status(error))
    trailing_metadata = (*status.trailing_metadata, (REQUEST_ID_HEADER, request_id))
    try:
        await context.abort(status.code, status.details, trailing_metadata=trailing_metadata)
    except grpc.aio.InternalError:
        # The caller has gone away just now, at its own deadline as a rule: that is no fault that gRPC should log.
        raise asyncio.CancelledError from None
    except grpc.aio.AbortError:
        refusals.write(code_of(error.reason), error.reason)
        raise


def code_of(reason: Reason) -> grpc.StatusCode:
    """Tell the gRPC code of a reason."""
    return CODES.get(reason, grpc.StatusCode.FAILED_PRECONDITION)


def retry_of(reason: Reason) -> Retry:
    """Return whether the same call can succeed against a reason when it is repeated."""
    return RETRIES.get(reason, RETRIES_OF_CODES[code_of(reason)])


def to_status(error: PointbookError) -> Status:
    """Write an error as google.rpc.Status, bounded so that it reaches the client whole."""
    status = Status(code=code_of(error.reason).value[0], message=error.message[:TEXT_LENGTH_MAX])
    info = ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = value.encode()[:METADATA_BYTES_MAX].decode(errors="ignore")
    bad_request = BadRequest()
    for violation in error.violations[:VIOLATIONS_MAX]:
        bad_request.field_violations.add(
            field=violation.field[:TEXT_LENGTH_MAX], description=violation.description[:TEXT_LENGTH_MAX]
        )
        if bad_request.ByteSize() > DETAILS_BYTES_MAX - info.ByteSize():
            del bad_request.field_violations[-1]
            break
    omitted = len(error.violations) - len(bad_request.field_violations)
    if omitted:
        info.metadata["omitted_violations"] = str(omitted)
    _pack(status, info)
    if error.violations:
        _pack(status, bad_request)
    if error.retry_after_seconds is not None:
        retry = RetryInfo()
        # Rounded: 1.001 s are a little less than 1,001 ms, and whoever retries by that must not come too early.
        retry.retry_delay.FromMilliseconds(round(error.retry_after_seconds * 1_000))
        _pack(status, retry)
    if error.reason in RESOURCES:
        resource_type, name = RESOURCES[error.reason]
        _pack(status, ResourceInfo(resource_type=resource_type, resource_name=info.metadata[name]))
    return status


def _pack(status: Status, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
