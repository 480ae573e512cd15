"""Reading of request bodies up to a limit."""

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shopline_shim.responses import BODY_INCOMPLETE, BODY_TOO_LARGE


class BodyError(Exception):
    """A body that was not read; `outcome` is its label in the metrics."""

    def __init__(self, outcome: str, response: Response) -> None:
        super().__init__(outcome)
        self.outcome = outcome
        self.response = response


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises BodyError if it is too large or the client disconnects.

    A declared length only ever refuses a body: one within the limit is counted as it arrives.
    """
    digits = request.headers.get("content-length", "").lstrip("0")
    # int() refuses thousands of digits, so compare their number first.
    if digits.isdecimal() and (len(digits) > len(str(max_bytes)) or int(digits) > max_bytes):
        raise BodyError("too_large", BODY_TOO_LARGE.response())
    body = bytearray()
    try:
        async for chunk in request.stream():
            request.state.connection.hold(len(chunk))
            body += chunk
            if len(body) > max_bytes:
                raise BodyError("too_large", BODY_TOO_LARGE.response())
    except ClientDisconnect:
        raise BodyError("incomplete", BODY_INCOMPLETE.response()) from None
    return bytes(body)
