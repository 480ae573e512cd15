"""Errors of the gRPC API, as a caller reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status


@dataclass(frozen=True)
class Refusal:
    """An RPC error with the details of its rich status."""

    code: grpc.StatusCode
    reason: str
    metadata: Mapping[str, str]
    fields: Mapping[str, str]
    retry_seconds: float | None
    message: str


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Return an error's rich status, which must have exactly one ErrorInfo."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # it takes aio errors too
    assert status is not None, f"no rich status in {error.code()} {error.details()}"
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    infos = [detail for detail in status.details if detail.Unpack(info)]
    assert len(infos) == 1
    assert info.domain == "pointbook"
    has_retry = False
    for detail in status.details:
        detail.Unpack(bad_request)
        has_retry = detail.Unpack(retry) or has_retry
    return Refusal(
        code=error.code(),
        reason=info.reason,
        metadata=dict(info.metadata),
        fields={violation.field: violation.description for violation in bad_request.field_violations},
        retry_seconds=retry.retry_delay.ToMilliseconds() / 1_000 if has_retry else None,
        message=error.details() or "",
    )


async def refused(call: Any) -> Refusal:
    """Await a call that must fail, and return its error."""
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    raise AssertionError(f"the call succeeded: {response}")


def wrong_fields(refusal: Refusal) -> set[str]:
    """Return the fields of a refusal with the reason INVALID_FIELDS."""
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    return set(refusal.fields)
