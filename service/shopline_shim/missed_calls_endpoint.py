"""`POST /callbacks/missed-call`: confirms calls that a provider reports."""

import time

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pointbook.v1 import redemption_pb2
from pointbook_client import InvalidArgumentError, PointbookError
from shopline_shim import callback_secret
from shopline_shim.metrics import Metrics
from shopline_shim.request_body import BodyError, read_body
from shopline_shim.responses import RETRY_AFTER, UNAVAILABLE, WRONG_SECRET, Problem
from shopline_shim.server_client import CallContext, ServerClient, log_unavailable
from shopline_shim.settings import ShimSettings, secret_values
from shopline_shim.translate_missed_call import MalformedCall, missed_call

log = structlog.get_logger()

# Many clients send the user and password of a URL only after this challenge.
_BASIC_CHALLENGE = {"WWW-Authenticate": 'Basic realm="pointbook"'}


class MissedCallsEndpoint:
    """The handler of missed-call callbacks.

    It checks the secret and the body's size, translates the callback, and calls the server. The provider learns whether
    the call matched a challenge, but not which one: with the challenge's id it could redeem points.

    Source: docs/reference/validation-codes.md#missed-calls
    """

    def __init__(self, settings: ShimSettings, metrics: Metrics) -> None:
        self._secrets = secret_values(settings.missed_call_secrets)
        self._field_names = settings.missed_call_fields
        self._max_body_bytes = settings.max_body_bytes
        self._timeout_seconds = settings.grpc_timeout_seconds
        self._metrics = metrics

    async def receive(self, request: Request) -> Response:
        """Handle and count one callback, without logging its content.

        Providers may build the id of a call from phone numbers.
        """
        outcome = "error"
        try:
            outcome, response = await self._handle(request)
        finally:
            self._metrics.missed_calls.labels(outcome).inc()
        log.debug("missed call", request_id=request.state.request_id, outcome=outcome, status=response.status_code)
        return response

    async def _handle(self, request: Request) -> tuple[str, Response]:
        now_ms = time.time_ns() // 1_000_000
        if not callback_secret.verify(self._secrets, request.headers):
            return "forged", WRONG_SECRET.response(_BASIC_CHALLENGE)
        try:
            raw_body = await read_body(request, self._max_body_bytes)
        except BodyError as error:
            return error.outcome, error.response
        request.state.connection.release(authentic=True)
        try:
            call = missed_call(request.headers, request.url.query, raw_body, self._field_names, now_ms)
            return await self._confirm(request, call)
        except MalformedCall as malformed:
            log.warning("missed call not understood", request_id=request.state.request_id, detail=str(malformed))
            return "malformed", Problem(400, "malformed-call", "Bad Request", str(malformed)).response()

    async def _confirm(self, request: Request, call: redemption_pb2.ConfirmMissedCallRequest) -> tuple[str, Response]:
        """Confirm a call, and return the outcome and the response.

        Raises MalformedCall if the server rejects fields, such as a number of no country.
        """
        client: ServerClient = request.state.client
        context = CallContext(request.state.request_id, time.monotonic() + self._timeout_seconds)
        try:
            response = await client.call(client.redemptions.ConfirmMissedCall, call, context)
        except InvalidArgumentError as error:
            wrong = {self._field_names.get(each.field, each.field): each.description for each in error.violations}
            raise MalformedCall(wrong) from None
        except PointbookError as error:
            log_unavailable(log.bind(request_id=request.state.request_id), "missed call not confirmed", error)
            return "unavailable", UNAVAILABLE.response(RETRY_AFTER)
        outcome = "SEEN" if response.challenge_id else "NO_CHALLENGE"
        return outcome.lower(), JSONResponse({"outcome": outcome})
