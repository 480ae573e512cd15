"""Random gRPC messages to a real server: only documented codes, no exceptions."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message

from pointbook.v1 import benefits_pb2, customers_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2
from pointbook_server.reasons import Reason
from pointbook_server.rpc.status_mapping import grpc_code
from support.clients import Client
from support.clocks import NOW_MS, at
from support.deployments import Deployment, error_lines
from support.honest_client import P99_RATIO_MAX, p99_ratio
from support.http2 import HEALTH_CHECK
from support.message_fuzzing import METHODS, MessageFuzzer, response_classes
from support.probes import grpc_health
from support.provider_servers import http_server
from support.randomness import printed_random
from support.refusals import refusal
from support.shops import Shop

CALLERS = 32
DOCUMENTED_CODES = {grpc_code(reason) for reason in Reason} - {grpc.StatusCode.INTERNAL}
LIBRARY_CODES = {grpc.StatusCode.RESOURCE_EXHAUSTED}
"""gRPC's own code for a message that is too large, without a Reason."""
VALIDATION_CODE = re.compile(r"\b[0-9]{6}\b")
HOSTILE_METADATA = (
    ("x-request-id", "a" * 65),
    ("x-request-id", "%0a\\n{}"),
    ("x-request-id", "ok-1"),
    ("x-unknown-bin", b"\x00\xff" * 20),
    ("grpc-tags-bin", b"\x00"),
    ("authorization", "Bearer pb_none_none"),
    ("traceparent", "00-" + "f" * 200),
)
FULL_CALLS = 100_000
ROUNDS = 3
ROUND_SECONDS = 2.0


@pytest.mark.parametrize("calls", [500, pytest.param(FULL_CALLS, marks=pytest.mark.soak)])
async def test_fuzzed_calls_get_only_documented_codes_and_harm_no_honest_caller(
    deployment: Deployment, figure: Callable[[str, float | str, str], None], calls: int
) -> None:
    is_full = calls == FULL_CALLS
    rounds = (ROUNDS, ROUND_SECONDS) if is_full else (1, 0.5)
    async with http_server() as gateway:
        settings = {"SMS_URL": f"http://127.0.0.1:{gateway.port}/", "MERCHANT_SENDS_MAX": "1000000"}
        async with deployment.server(**settings) as server, deployment.honest_calls() as honest:
            client = await deployment.client()
            before = await honest.rounds(*rounds)
            callers = FuzzingCallers(deployment, client, printed_random())
            await callers.prepare()
            await callers.run(calls)
            after = await honest.rounds(*rounds)
            health = await grpc_health(deployment.grpc_address)
            await client.close()
        codes = dict(callers.codes.most_common())
        figure(f"{calls:,} fuzzed gRPC calls: codes", " ".join(f"{name} {n}" for name, n in codes.items()), "")
        figure(
            f"{calls:,} fuzzed gRPC calls: ratio of honest callers' p99 afterwards", p99_ratio(before, after), "<= 2"
        )
        figure(
            f"{calls:,} fuzzed gRPC calls: methods with a successful call",
            f"{len(callers.successful_methods)}/{len(METHODS) + 1}",
            "",
        )
        assert callers.undocumented == []
        assert error_lines(server.err) == []
        assert (health, sum(each.failed for each in (*before, *after))) == ("SERVING", 0)
        # The p99 of half a second is meaningless.
        assert not is_full or p99_ratio(before, after) <= P99_RATIO_MAX
        assert deployment.token.rpartition("_")[2] not in server.err
        sent = {code for request in gateway.requests for code in VALIDATION_CODE.findall(request.json.get("text", ""))}
        assert not sent & callers.possible_codes, "a response contains a validation code"


class FuzzingCallers:
    """Callers that send generated calls and check the responses."""

    def __init__(self, deployment: Deployment, client: Client, generator: random.Random) -> None:
        self._deployment, self._client, self._random = deployment, client, generator
        self._fuzzer = MessageFuzzer(generator)
        self._response_classes = dict(response_classes())
        self._metadata = ("authorization", f"Bearer {deployment.token}")
        self.codes: Counter[str] = Counter()
        self.undocumented: list[str] = []
        self.successful_methods: set[str] = set()
        self.possible_codes: set[str] = set()

    async def prepare(self) -> None:
        """Create a merchant with customers and points, and set the fuzzer's values."""
        shop, client, set_values = self._deployment.shop, self._client, self._fuzzer.set_values
        program = await client.put_program(
            shop.merchant_id,
            shop.store_id,
            settlement_window={"seconds": 600},
            allow_group_redemption=True,
            validation={
                "allow_skip": True,
                "channels": [1, 2, 4],
                "missed_call_number": "+12025550199",
            },
        )
        self._fuzzer.examples = examples_of(shop, program)
        for number in range(4):
            buyer = {"store_id": shop.store_id, "buyer_id": f"buyer-{number}"}
            await client.put_customer(
                shop.merchant_id, f"customer-{number}", mobile=f"+1202555010{number}", buyers=[buyer]
            )
            await client.apply(shop.update(f"buyer-{number}", updated_value=10_000, points_balance=10_000))
        set_values("merchant_id", shop.merchant_id)
        set_values("store_id", shop.store_id)
        set_values("store_ids", shop.store_id)
        set_values("buyer_id", *(f"buyer-{number}" for number in range(8)))
        for name in ("customer_id", "primary_customer_id", "external_id"):
            set_values(name, *(f"customer-{number}" for number in range(5)))
        set_values("mobile", *(f"+1202555010{number}" for number in range(5)))
        set_values("email", *(f"customer{number}@example.com" for number in range(5)))
        set_values("event_id", *(f"event-{number}" for number in range(30)))
        for name in ("group_id", "benefit_id", "privilege_id", "external_reference_number", "card_number"):
            set_values(name, *(f"{name}-{number}" for number in range(8)))
        set_values("program_id", 1, 1, 2)
        set_values("points", 10, 20, 50)
        set_values("page_size", 1, 10, 1_000)
        set_values("currency_code", "USD")
        set_values("local_currency_code", "USD")
        set_values("point_value", "0.01")
        set_values("time_zone", "UTC")
        set_values("default_region", "US")
        set_values("reason", "because")
        set_values("primary_user_identifier_type", "MOBILE")
        set_values("local_currency_rate", "1")
        set_values("settlement_scenes", 7)

    async def run(self, calls: int) -> None:
        """Make a number of calls."""
        remaining = iter(range(calls))

        async def caller() -> None:
            for _ in remaining:
                await self._call()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def _call(self) -> None:
        if self._random.random() < 0.01:
            path, raw = HEALTH_CHECK, self._random.randbytes(self._random.randrange(20))
        else:
            path, raw = self._fuzzer.call()
        metadata = [self._metadata]
        if self._random.random() < 0.05:
            metadata.append(self._random.choice(HOSTILE_METADATA))  # type: ignore[arg-type] # bytes for -bin
        call: Any = self._client.channel.unary_unary(path)
        try:
            raw_response = await call(raw, metadata=metadata, timeout=30.0)
        except grpc.aio.AioRpcError as error:
            self._check_error(path, raw, error)
            return
        self.codes["OK"] += 1
        self.successful_methods.add(path)
        self.possible_codes |= set(VALIDATION_CODE.findall(raw_response.decode(errors="replace")))
        response_class = self._response_classes.get(path)
        if response_class is not None:
            self._fuzzer.learn(response_class.FromString(raw_response))

    def _check_error(self, path: str, raw: bytes, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        self.codes[code.name] += 1
        try:
            reason = refusal(error).reason
        except (AssertionError, DecodeError):
            reason = ""
        if code not in DOCUMENTED_CODES or (not reason and code not in LIBRARY_CODES and path != HEALTH_CHECK):
            self.undocumented.append(f"{path} {code.name} {reason} {error.details()} {raw[:300].hex()}")


def examples_of(shop: Shop, program: programs_pb2.Program) -> dict[str, list[Message]]:
    """Return valid requests, by message, of methods that need matching fields.

    Generated requests rarely pass the field checks of these methods.
    """
    mobile = "+12025550100"
    merchant: dict[str, Any] = {"merchant_id": shop.merchant_id}
    customer: dict[str, Any] = {**merchant, "mobile": mobile}
    benefit = benefits_pb2.Benefit(
        **merchant,
        benefit_id="benefit_id-1",
        store_ids=[shop.store_id],
        level_code="MLC17",
        benefits_name="Birthday",
        benefits_details="12.50",
        benefits_expiry_date_type=benefits_pb2.BENEFITS_EXPIRY_DATE_TYPE_SPECIFIC_DATE,
        benefits_expiry_date_value=30,
        benefits_issurance_type=benefits_pb2.BENEFITS_ISSURANCE_TYPE_PERIODICALLY,
        benefits_status=benefits_pb2.BENEFITS_STATUS_ACTIVE,
        periodically_days=10,
        periodically_months="3",
        reward_type=benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT,
    )
    benefit.irrelevant_values.update({"fixed_date": "15", "specific_date": 2.5})
    benefit_key: dict[str, Any] = {**merchant, "benefit_id": benefit.benefit_id}
    voided: dict[str, Any] = {**merchant, "event_ids": ["event-1"], "reason": "A test till."}
    redeemed: dict[str, Any] = {"customer": customer, "program_id": 1, "points": 10}
    webhook: dict[str, Any] = {**merchant, "topic": "app_memberSystem_points/challenged", "body": b"{}", "reason": 1}
    call: dict[str, Any] = {
        "caller_number": mobile,
        "called_number": "+12025550199",
        "provider_call_id": "call",
        "call_time": at(NOW_MS),
    }
    requests = (
        programs_pb2.PutProgramRequest(program=program),
        benefits_pb2.PutBenefitRequest(benefit=benefit),
        benefits_pb2.GetBenefitRequest(**benefit_key),
        benefits_pb2.DeleteBenefitRequest(**benefit_key),
        benefits_pb2.PreviewBenefitScheduleRequest(**benefit_key),
        customers_pb2.MoveIdentifierRequest(
            **merchant,
            mobile=mobile,
            from_customer_id="customer-0",
            to_customer_id="customer-1",
            reason="Requested by phone.",
        ),
        points_pb2.ApplyPointsUpdateRequest(update=shop.update("buyer-0", event_id="event-1")),
        points_pb2.VoidPointsEntriesRequest(**voided),
        points_pb2.UnvoidPointsEntriesRequest(**voided),
        redemption_pb2.ValidateRedemptionRequest(**redeemed),
        redemption_pb2.IssueValidationCodeRequest(**redeemed),
        redemption_pb2.IssueValidationCodeRequest(
            **redeemed, validation_type=redemption_pb2.VALIDATION_TYPE_MISSED_CALL
        ),
        redemption_pb2.RedeemPointsRequest(**redeemed, external_reference_number="reference-1"),
        redemption_pb2.RedeemPointsRequest(**redeemed, external_reference_number="reference-2"),
        redemption_pb2.ReverseRedemptionRequest(
            **merchant, redeemed_reference_number="reference-1", points=1, external_reference_number="reversal-1"
        ),
        redemption_pb2.ConfirmMissedCallRequest(**merchant, **call),
        webhooks_pb2.QuarantineWebhookRequest(**webhook),
        webhooks_pb2.ReplayQuarantinedWebhookRequest(
            **merchant, quarantine_id="unknown", points_update=shop.update("buyer-0")
        ),
    )
    examples: dict[str, list[Message]] = {}
    for request in requests:
        examples.setdefault(request.DESCRIPTOR.name, []).append(request)
    return examples
