"""What all calls have in common: metadata, deadlines, errors and observers."""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from pointbook.v1 import points_pb2
from pointbook_client.errors import (
    BY_CODE,
    REQUEST_ID_KEY,
    FieldViolation,
    PointbookError,
    read_details,
)
from pointbook_client.keywords import check_type
from pointbook_client.observers import CallObserver, log_failures
from pointbook_client.reasons import BY_REASON, InvalidFieldsError

_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_AUTHORIZATION_KEY = "authorization"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""The request ids that servers use."""
TIMEOUT_SECONDS_MAX = 86_400.0
"""The longest deadline. gRPC takes one that it cannot represent, such as infinity, for one that has passed."""
REQUEST_BYTES_MAX = 1024 * 1024
"""The largest request that servers read."""
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class CallDefaults:
    """What a call has unless it says otherwise."""

    timeout_seconds: float
    token: Callable[[], str]
    request_id: str = ""
    observer: CallObserver | None = None

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= TIMEOUT_SECONDS_MAX:
            raise ValueError("the timeout must be more than 0 seconds, and at most a day")

    def timeout(self, own: float | None) -> float:
        """Return the deadline of a call in seconds: its own, if it has one.

        Raises ValueError if gRPC cannot represent it.
        """
        if own is None:
            return self.timeout_seconds
        if not own <= TIMEOUT_SECONDS_MAX:
            raise ValueError("the timeout must be at most a day")
        return own

    @contextmanager
    def running(self, method: str, own: Iterable[tuple[str, str | bytes]] | None) -> Iterator[Metadata]:
        """Yield the metadata of the call that is made in the block.

        A request id and the token are added to its own. The observer sees the call. Raises PointbookError in place of
        grpcio's errors.
        """
        sent = dict(own or ())
        request_id = sent.setdefault(REQUEST_ID_KEY, self.request_id or secrets.token_hex(16))
        if _AUTHORIZATION_KEY not in sent and (token := _usable_token(self.token())):
            sent[_AUTHORIZATION_KEY] = f"Bearer {token}"
        observed = None
        with log_failures():
            observed = self.observer.start(method) if self.observer else None
        if observed is not None:
            with log_failures():
                sent.update(observed.metadata())
        # Until it ends: only a call whose caller is cancelled keeps this code.
        code = grpc.StatusCode.CANCELLED
        try:
            yield tuple(sent.items())
            code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            failure = to_error(error, str(request_id))
            code = failure.grpc_code
            try:
                raise failure from None
            finally:
                del failure  # Its traceback has this frame, which would keep the call until a collection of garbage.
        finally:
            if observed is not None:
                with log_failures():
                    observed.end(code)


def usable_request_id(request_id: str) -> str:
    """Return a request id, or an empty one in place of one that servers replace.

    It may come from a caller outside, and grpcio fails calls with some characters.
    """
    return request_id if _REQUEST_ID.fullmatch(request_id) else ""


def size_error(size: int) -> PointbookError | None:
    """Return the error of a request of so many bytes, or None if servers read it.

    gRPC would send it, and fail the call without a reason, as if sending it again could help.
    """
    if size <= REQUEST_BYTES_MAX:
        return None
    return InvalidFieldsError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"The request has {size:,} bytes, which are more than {REQUEST_BYTES_MAX:,}.",
        reason="INVALID_FIELDS",
    )


def _usable_token(token: str) -> str:
    """Return a token without blanks around it, such as the line break of a file.

    Raises TypeError and ValueError if it cannot be sent, as gRPC's own error would contain it.
    """
    check_type(str, token=token)
    token = token.strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("the token has characters that no header can have")
    return token


def to_error(error: Any, request_id: str) -> PointbookError:
    """Return the exception of a failed call.

    `error` is the RpcError of grpcio, of asyncio or not. `request_id` is used if the server returned none.
    """
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or ())
    details = read_details(trailing)
    reason = details.info.reason
    code = error.code()
    answered = next((value for key, value in trailing if key == REQUEST_ID_KEY), request_id)
    return BY_REASON.get(reason, BY_CODE.get(code, PointbookError))(
        code,
        error.details() or "",
        reason=reason,
        metadata=dict(details.info.metadata),
        violations=details.violations,
        request_id=str(answered),
        retry_delay=details.retry_delay,
        trailing_metadata=trailing,
    )


def to_update_error(error: points_pb2.UpdateError, request_id: str = "") -> PointbookError:
    """Return the exception that a call for this update alone would have raised.

    `request_id` is that of the batch, which the server's log has.
    """
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    return BY_REASON.get(error.reason, BY_CODE.get(code, PointbookError))(
        code,
        error.message,
        reason=error.reason,
        metadata=dict(error.metadata),
        violations=[FieldViolation(item.field, item.description) for item in error.violations],
        request_id=request_id,
    )
