"""The gRPC services of a server process, built from all capabilities."""

from collections.abc import Mapping

import grpc

from pointbook.v1 import (
    access_pb2,
    access_pb2_grpc,
    benefits_pb2,
    benefits_pb2_grpc,
    customers_pb2,
    customers_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    programs_pb2,
    programs_pb2_grpc,
    redemption_pb2,
    redemption_pb2_grpc,
    webhooks_pb2,
    webhooks_pb2_grpc,
)
from pointbook_server.access.servicer import AccessServicer
from pointbook_server.benefits.servicer import BenefitsServicer
from pointbook_server.benefits.transactions import BenefitTransactions
from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.group_transactions import UserGroupTransactions
from pointbook_server.customers.servicer import CustomersServicer
from pointbook_server.customers.tombstones import Tombstones
from pointbook_server.customers.transactions import CustomerTransactions
from pointbook_server.db.clock_skew import ServerClock
from pointbook_server.db.database import Database
from pointbook_server.delivery.sender import Sender
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.messages import SCENE_NAMES
from pointbook_server.ledger.model import ApplyResult, ReceivedEvent
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.ledger.transactions import LedgerTransactions
from pointbook_server.metrics import BatchMetrics, EventMetrics, Metrics
from pointbook_server.programs.erasures.transactions import StoreErasureTransactions
from pointbook_server.programs.model import Channel
from pointbook_server.programs.servicer import ProgramsServicer
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.programs.webhook_times import WebhookTimes
from pointbook_server.redemption.history import RedemptionHistory
from pointbook_server.redemption.service import RedemptionService
from pointbook_server.redemption.servicer import RedemptionServicer
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.retention import build_clean_ups
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.status_mapping import grpc_code
from pointbook_server.settings import ServerSettings
from pointbook_server.support.recorder import RefusalRecorder
from pointbook_server.support.servicer import SupportServicer
from pointbook_server.support.timeline import Timeline
from pointbook_server.support.transactions import RefusalTransactions
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.service import CodePolicy, ValidationCodes
from pointbook_server.validation_codes.servicer import ValidationCodesServicer
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from pointbook_server.webhooks.encryption import PayloadCipher
from pointbook_server.webhooks.quota import limits_of
from pointbook_server.webhooks.replay import Replayer
from pointbook_server.webhooks.servicer import WebhooksServicer
from pointbook_server.webhooks.transactions import QuarantineTransactions

SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (points_pb2, "PointsService"),
        (redemption_pb2, "RedemptionService"),
        (programs_pb2, "ProgramsService"),
        (benefits_pb2, "BenefitsService"),
        (customers_pb2, "CustomersService"),
        (webhooks_pb2, "WebhooksService"),
        (access_pb2, "AccessService"),
    )
)
UPDATES_IN_BATCH_MAX = 500
UPDATES_WAITING_MAX = 10_000
CONCURRENT_BATCHES_MAX = 4
"""How many merchants' updates are written concurrently; those of one merchant are written one batch at a time."""
ABANDONED_SECONDS_MAX = 60.0
"""How long a transaction can continue after its caller's deadline, since each of its statements has a timeout."""


class Services:
    """The capabilities of one server process, built once and connected to each other.

    With `development`, stores are registered on first sight, and changed contacts get codes at once.
    """

    def __init__(
        self,
        settings: ServerSettings,
        database: Database,
        senders: Mapping[Channel, Sender],
        clock: ServerClock,
        metrics: Metrics,
        *,
        development: bool,
    ) -> None:
        self.quarantine = _build_quarantine(settings, database, metrics)
        programs = ProgramTransactions(database, self.quarantine)
        challenges = ValidationCodeTransactions(database)
        redemptions = RedemptionTransactions(database, programs, AccountRepository, CustomerRepository, challenges)
        events = EventMetrics(metrics, SCENE_NAMES.values())
        self.ledger = LedgerTransactions(
            database, redemptions, metrics, count_event=events.count, register_stores=development
        )
        self.webhook_times = WebhookTimes(database, metrics)
        tombstones = Tombstones(list(settings.code_key_bytes().values()))
        customers = CustomerTransactions(database, self.quarantine, challenges, tombstones, register_stores=development)
        self.points_batcher = _build_points_batcher(self.ledger, metrics)
        policy = CodePolicy(
            contact_pause_ms=0 if development else int(settings.contact_pause_seconds * 1_000),
            merchant_sends_max=settings.merchant_sends_max,
        )
        keys = KeyRing(settings.code_key_bytes())
        self.codes = ValidationCodes(challenges, keys, senders, clock, metrics=metrics, policy=policy)
        self.refusals = RefusalRecorder(
            RefusalTransactions(database), clock, metrics, keep_days=settings.refusals_keep_days
        )
        self.redemptions = RedemptionService(redemptions, self.codes, self.refusals, clock, metrics=metrics)
        self.store_erasures = StoreErasureTransactions(database, customers, self.quarantine, clock, metrics)
        self._points = PointsServicer(
            self.ledger,
            programs,
            self.points_batcher,
            clock,
            grpc_code=grpc_code,
            metrics=metrics,
            events=events,
            webhook_times=self.webhook_times,
        )
        timeline = Timeline(self._points, RedemptionHistory(database), self.codes, self.refusals)
        self._redemption = RedemptionServicer(
            self.redemptions,
            ValidationCodesServicer(self.redemptions, self.codes),
            SupportServicer(self.redemptions, self.refusals, timeline),
            clock,
        )
        self._customers = CustomersServicer(
            customers, UserGroupTransactions(database), clock, webhook_times=self.webhook_times
        )
        self._programs = ProgramsServicer(programs, self.store_erasures, clock)
        self._benefits = BenefitsServicer(BenefitTransactions(database, programs), clock)
        replayer = Replayer(
            self.quarantine,
            self._points,
            self._customers,
            self._programs,
            clock,
            duration_max_ms=int((settings.call_deadline_seconds + ABANDONED_SECONDS_MAX) * 1_000),
        )
        self._webhooks = WebhooksServicer(self.quarantine, replayer, clock)
        self.clean_ups = build_clean_ups(settings, database, self.quarantine)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register all services with a server."""
        points_pb2_grpc.add_PointsServiceServicer_to_server(self._points, server)
        redemption_pb2_grpc.add_RedemptionServiceServicer_to_server(self._redemption, server)
        customers_pb2_grpc.add_CustomersServiceServicer_to_server(self._customers, server)
        programs_pb2_grpc.add_ProgramsServiceServicer_to_server(self._programs, server)
        benefits_pb2_grpc.add_BenefitsServiceServicer_to_server(self._benefits, server)
        webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server(self._webhooks, server)
        access_pb2_grpc.add_AccessServiceServicer_to_server(AccessServicer(), server)

    async def drain(self) -> None:
        """Wait until all work in the background has ended."""
        await self.points_batcher.drain()
        await self.ledger.drain()
        await self.redemptions.drain()
        await self.codes.drain()
        await self.refusals.close()


def _build_points_batcher(ledger: LedgerTransactions, metrics: Metrics) -> Batcher[str, ReceivedEvent, ApplyResult]:
    return Batcher(
        ledger.apply,
        batch_max=UPDATES_IN_BATCH_MAX,
        waiting_max=UPDATES_WAITING_MAX,
        max_concurrent_batches=CONCURRENT_BATCHES_MAX,
        observer=BatchMetrics(metrics, "updates"),
        send_together=ledger.apply_merchants,
        may_send_together=ledger.may_apply_merchants,
    )


def _build_quarantine(settings: ServerSettings, database: Database, metrics: Metrics) -> QuarantineTransactions:
    return QuarantineTransactions(
        database,
        PayloadCipher(settings.quarantine_key_bytes()),
        limits_of(settings),
        metrics,
    )
