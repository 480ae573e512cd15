"""Random gRPC messages at a real server: only documented codes, no exception in its log, and it serves on."""

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
from pointbook_server.errors import Reason
from pointbook_server.rpc.status_mapping import grpc_code
from support.harness import NOW_MS, Client, Shop, at, refusal
from support.honest import P99_RATIO_MAX, p99_ratio
from support.http2 import HEALTH_CHECK
from support.message_fuzzing import METHODS, MessageFuzzer, responses
from support.processes import grpc_health
from support.provider_servers import http_server
from support.sites import Site, faults

CALLERS = 32
DOCUMENTED = {grpc_code(reason) for reason in Reason} - {grpc.StatusCode.INTERNAL}
LIBRARY_CODES = {grpc.StatusCode.RESOURCE_EXHAUSTED}
"""What gRPC itself says of a message that is too large, without a reason of ours."""
CODE = re.compile(r"\b[0-9]{6}\b")
HOSTILE_METADATA = (
    ("x-request-id", "a" * 65),
    ("x-request-id", "%0a\\n{}"),
    ("x-request-id", "ok-1"),
    ("x-unknown-bin", b"\x00\xff" * 20),
    ("grpc-tags-bin", b"\x00"),
    ("authorization", "Bearer pb_none_none"),
    ("traceparent", "00-" + "f" * 200),
)
IN_FULL = 100_000
ROUNDS = 3
ROUND_SECONDS = 2.0


@pytest.mark.parametrize("calls", [500, pytest.param(IN_FULL, marks=pytest.mark.soak)])
async def test_fuzzed_calls(site: Site, figure: Callable[[str, float | str, str], None], calls: int) -> None:
    """Any bytes get an answer of ours."""
    in_full = calls == IN_FULL
    rounds = (ROUNDS, ROUND_SECONDS) if in_full else (1, 0.5)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    async with http_server() as gateway:
        settings = {"SMS_URL": f"http://127.0.0.1:{gateway.port}/", "MERCHANT_SENDS_MAX": "1000000"}
        async with site.server(**settings) as server, site.honest_calls() as honest:
            client = await site.client()
            before = await honest.rounds(*rounds)
            fuzz = Fuzz(site, client, random.Random(seed))  # noqa: S311 - it is to be repeatable
            await fuzz.prepare()
            await fuzz.run(calls)
            after = await honest.rounds(*rounds)
            health = await grpc_health(site.grpc_address)
            await client.close()
        codes = dict(fuzz.codes.most_common())
        figure(f"{calls:,} fuzzed gRPC calls: codes", " ".join(f"{name} {n}" for name, n in codes.items()), "")
        figure(f"{calls:,} fuzzed gRPC calls: honest callers' p99 afterwards, ratio", p99_ratio(before, after), "<= 2")
        figure(f"{calls:,} fuzzed gRPC calls: methods that served one", f"{len(fuzz.served)}/{len(METHODS) + 1}", "")
        assert fuzz.undocumented == []
        assert faults(server.err) == []
        assert (health, sum(each.failed for each in (*before, *after))) == ("SERVING", 0)
        # The p99 of half a second says nothing.
        assert not in_full or p99_ratio(before, after) <= P99_RATIO_MAX
        assert site.token.rpartition("_")[2] not in server.err
        sent = {code for request in gateway.requests for code in CODE.findall(request.json.get("text", ""))}
        assert not sent & fuzz.sixes, "an answer holds a code"


class Fuzz:
    """Callers that send what a fuzzer makes up, and look at what comes back."""

    def __init__(self, site: Site, client: Client, source: random.Random) -> None:
        self._site, self._client, self._random = site, client, source
        self._fuzzer = MessageFuzzer(source)
        self._responses = dict(responses())
        self._metadata = ("authorization", f"Bearer {site.token}")
        self.codes: Counter[str] = Counter()
        self.undocumented: list[str] = []
        self.served: set[str] = set()
        self.sixes: set[str] = set()

    async def prepare(self) -> None:
        """Make a merchant with all that calls can name, and have the fuzzer know it."""
        shop, client, know = self._site.shop, self._client, self._fuzzer.know
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
        know("merchant_id", shop.merchant_id)
        know("store_id", shop.store_id)
        know("store_ids", shop.store_id)
        know("buyer_id", *(f"buyer-{number}" for number in range(8)))
        for name in ("customer_id", "primary_customer_id", "external_id"):
            know(name, *(f"customer-{number}" for number in range(5)))
        know("mobile", *(f"+1202555010{number}" for number in range(5)))
        know("email", *(f"customer{number}@example.com" for number in range(5)))
        know("event_id", *(f"event-{number}" for number in range(30)))
        for name in ("group_id", "benefit_id", "privilege_id", "external_reference_number", "card_number"):
            know(name, *(f"{name}-{number}" for number in range(8)))
        know("program_id", 1, 1, 2)
        know("points", 10, 20, 50)
        know("page_size", 1, 10, 1_000)
        know("currency_code", "USD")
        know("local_currency_code", "USD")
        know("point_value", "0.01")
        know("time_zone", "UTC")
        know("default_region", "US")
        know("reason", "because")
        know("primary_user_identifier_type", "MOBILE")
        know("local_currency_rate", "1")
        know("settlement_scenes", 7)

    async def run(self, calls: int) -> None:
        """Send so many."""
        left = iter(range(calls))

        async def caller() -> None:
            for _ in left:
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
            answer = await call(raw, metadata=metadata, timeout=30.0)
        except grpc.aio.AioRpcError as error:
            self._judge(path, raw, error)
            return
        self.codes["OK"] += 1
        self.served.add(path)
        self.sixes |= set(CODE.findall(answer.decode(errors="replace")))
        response = self._responses.get(path)
        if response is not None:
            self._fuzzer.learn(response.FromString(answer))

    def _judge(self, path: str, raw: bytes, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        self.codes[code.name] += 1
        try:
            reason = refusal(error).reason
        except (AssertionError, DecodeError):
            reason = ""
        if code not in DOCUMENTED or (not reason and code not in LIBRARY_CODES and path != HEALTH_CHECK):
            self.undocumented.append(f"{path} {code.name} {reason} {error.details()} {raw[:300].hex()}")


def examples_of(shop: Shop, program: programs_pb2.Program) -> dict[str, list[Message]]:
    """Make valid requests of methods that made-up ones hardly ever reach."""
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
    named: dict[str, Any] = {**merchant, "benefit_id": benefit.benefit_id}
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
        benefits_pb2.GetBenefitRequest(**named),
        benefits_pb2.DeleteBenefitRequest(**named),
        benefits_pb2.PreviewBenefitScheduleRequest(**named),
        customers_pb2.MoveIdentifierRequest(
            **merchant, mobile=mobile, from_customer_id="customer-0", to_customer_id="customer-1", reason="As asked."
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
