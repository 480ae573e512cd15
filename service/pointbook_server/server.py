"""The composition root: builds everything once, starts it, drains it and stops it."""

import asyncio
import math
from collections.abc import Mapping

import grpc
import structlog
from grpc_reflection.v1alpha import reflection

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
from pointbook_common.certificates import TlsSource
from pointbook_common.open_files import CONNECTIONS_MAX, max_client_connections
from pointbook_server.access.servicer import AccessServicer
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.benefits.servicer import BenefitsServicer
from pointbook_server.benefits.transactions import BenefitTransactions
from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.group_transactions import UserGroupTransactions
from pointbook_server.customers.servicer import CustomersServicer
from pointbook_server.customers.tombstones import Tombstones
from pointbook_server.customers.transactions import CustomerTransactions
from pointbook_server.db.clock_skew import SYSTEM_CLOCK, ClockSkew, ServerClock
from pointbook_server.db.database import Database
from pointbook_server.db.database_health import DatabaseHealth
from pointbook_server.db.schema import check_schema
from pointbook_server.delivery.sender import Sender
from pointbook_server.delivery.senders import close_senders
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.ledger.transactions import LedgerTransactions
from pointbook_server.maintenance import Maintenance
from pointbook_server.metrics import Metrics, MetricsEndpoint
from pointbook_server.programs.erasures.transactions import StoreErasureTransactions
from pointbook_server.programs.model import Channel
from pointbook_server.programs.servicer import ProgramsServicer
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.redemption.history import RedemptionHistory
from pointbook_server.redemption.service import RedemptionService
from pointbook_server.redemption.servicer import RedemptionServicer
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.rpc.admission import Admission
from pointbook_server.rpc.auth_interceptor import AuthInterceptor
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.health import REQUEST_BYTES_MAX, HealthService
from pointbook_server.rpc.health import SERVICE_NAME as HEALTH
from pointbook_server.rpc.refusal_limits import ALL_CODES, Pacer, RefusalLog
from pointbook_server.rpc.running_calls import RunningCalls
from pointbook_server.rpc.status_interceptor import StatusInterceptor
from pointbook_server.rpc.status_mapping import grpc_code
from pointbook_server.rpc.tls import server_credentials, tls_source
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
from pointbook_server.webhooks.model import Capacity, QuarantineLimits
from pointbook_server.webhooks.replay import Replayer
from pointbook_server.webhooks.servicer import WebhooksServicer
from pointbook_server.webhooks.transactions import QuarantineTransactions

SERVICES = tuple(
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
GOODBYE_SECONDS = 0.05
"""How long gRPC takes to tell all its clients that they should connect to another server."""
HANDLERS_CLEANUP_SECONDS = 1.5
UPDATES_IN_BATCH_MAX = 500
UPDATES_WAITING_MAX = 10_000
LANES = 4
"""How many merchants' updates are written at a time; one merchant's take one transaction after the other."""
ABANDONED_SECONDS_MAX = 60.0
"""How long a transaction may run on when its caller's deadline has passed: each statement has a timeout."""
METADATA_BYTES_MAX = 8 * 1024
MESSAGE_BYTES_MAX = 1024 * 1024
HANDSHAKE_MS_MAX = 5_000
IDLE_MS_MAX = 5 * 60_000
HEALTH_CONNECTIONS_MAX = 50

log = structlog.get_logger()


class Server:
    """One server process. `start` it, and `stop` it in the same event loop.

    With `development` there are no tokens, reflection is on, and stores are registered on first sight: for
    `pointbook dev` on loopback only.
    """

    def __init__(
        self,
        settings: ServerSettings,
        database_url: str,
        *,
        senders: Mapping[Channel, Sender],
        development: bool = False,
        clock: ServerClock = SYSTEM_CLOCK,
    ) -> None:
        self._settings = settings
        self._senders = senders
        self._database = Database(database_url, pool_size=settings.database_pool_size)
        self._tokens = (
            None
            if development
            else TokenCache(
                TokenTransactions(self._database), clock, staleness_seconds=settings.token_staleness_seconds
            )
        )
        self.metrics = Metrics()
        self._skew = ClockSkew(clock, self.metrics)
        self._pacer = Pacer()
        self._running_calls = RunningCalls()
        status_interceptor = StatusInterceptor(
            deadline_seconds=settings.call_deadline_seconds,
            running_calls=self._running_calls,
            refusals=RefusalLog(),
            pacer=self._pacer,
        )
        self._admission = Admission(
            token_calls_max=settings.token_calls_max,
            token_calls_per_second_max=settings.token_calls_per_second_max,
            check_clock=self._skew.check_call,
        )
        self._health = HealthService(SERVICES, RefusalLog(ALL_CODES), self._pacer)
        checks = (self._skew.check, check_schema)
        self._database_health = DatabaseHealth(self._database, self._health.set_serving, checks)
        self._maintaining: asyncio.Task[None] | None = None
        self._metrics_endpoint: MetricsEndpoint | None = None
        self._server = grpc.aio.server(
            interceptors=(status_interceptor, AuthInterceptor(self._tokens, self._admission)),
            options=grpc_options(
                reuse_port=settings.workers > 1,
                connections_max=settings.connections_max or max_client_connections(settings.database_pool_size),
            ),
        )
        self._add_services(senders, clock, development=development)
        self._maintenance = Maintenance(
            self._database,
            self._skew,
            tokens=self._tokens,
            redemptions=self._redemptions,
            codes=self._codes,
            refusals=self._refusals,
            store_erasures=self._store_erasures,
            quarantine=self._quarantine,
        )
        self.port = self._listen(settings)
        self._health_server = self._build_health_server(settings)

    async def start(self) -> None:
        """Serve. Health tells NOT_SERVING until the database answers."""
        if self._settings.metrics_address:
            self._metrics_endpoint = MetricsEndpoint(
                self.metrics, self._settings.metrics_address, reuse_port=self._settings.workers > 1
            )
        if self._tokens is not None:
            await self._tokens.start()
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        await self._database_health.check()
        self._database_health.start()
        self._maintaining = asyncio.create_task(self._maintenance.run_maintenance())

    async def stop(self) -> None:
        """Stop: health turns NOT_SERVING, running calls finish within the drain time, then everything closes."""
        if self._maintaining is not None:
            self._maintaining.cancel()
        self._health.stop()
        half_seconds = self._settings.drain_seconds / 2
        await self._admission.pause(half_seconds)
        stopping = asyncio.create_task(self._server.stop(half_seconds))
        await asyncio.sleep(GOODBYE_SECONDS)
        self._health.end_watches()
        self._admission.refuse()
        await stopping
        if self._health_server is not None:
            await self._health_server.stop(0)
        # The server has stopped before its handlers have cleaned up; only then may the connections go.
        try:
            async with asyncio.timeout(HANDLERS_CLEANUP_SECONDS):
                await self._running_calls.drain()
                await self._points_batcher.drain()
                await self._redemptions.drain()
                await self._codes.drain()
                await self._refusals.close()
                await self._maintenance.write_token_use()
        except TimeoutError:
            log.warning("some calls did not end in time")
        # Until here the check has ended calls that a hanging database kept.
        await self._database_health.close()
        if self._tokens is not None:
            await self._tokens.close()
        await close_senders(self._senders.values())
        await self._database.dispose()
        if self._metrics_endpoint is not None:
            self._metrics_endpoint.close()

    def _listen(self, settings: ServerSettings) -> int:
        """Open the port, and return its number. Raises OSError, and SettingError where TLS files are wrong."""
        tls = tls_source(settings)
        if tls is not None:
            self.metrics.tls_certificate_expiry.set_function(
                lambda: expires_at.timestamp() if (expires_at := tls.current().expires_at) else math.nan
            )
        return _open_port(self._server, "POINTBOOK_GRPC_ADDRESS", settings.grpc_address, tls)

    def _add_services(self, senders: Mapping[Channel, Sender], clock: ServerClock, *, development: bool) -> None:
        self._quarantine = quarantine = self._build_quarantine()
        programs = ProgramTransactions(self._database, quarantine)
        challenges = ValidationCodeTransactions(self._database)
        kept = RedemptionTransactions(self._database, programs, AccountRepository, CustomerRepository, challenges)
        ledger = LedgerTransactions(self._database, kept, register_stores=development)
        self._points_batcher = Batcher(
            ledger.apply, batch_max=UPDATES_IN_BATCH_MAX, waiting_max=UPDATES_WAITING_MAX, max_concurrent_batches=LANES
        )
        self._codes = ValidationCodes(
            challenges,
            KeyRing(self._settings.code_key_bytes()),
            senders,
            clock,
            metrics=self.metrics,
            policy=CodePolicy(
                contact_pause_ms=0 if development else int(self._settings.contact_pause_seconds * 1_000),
                merchant_sends_max=self._settings.merchant_sends_max,
            ),
        )
        self._refusals = RefusalRecorder(
            RefusalTransactions(self._database), clock, self.metrics, keep_days=self._settings.refusals_keep_days
        )
        self._redemptions = RedemptionService(kept, self._codes, self._refusals, clock)
        server = self._server
        points = PointsServicer(
            ledger, programs, self._points_batcher, clock, grpc_code=grpc_code, metrics=self.metrics
        )
        points_pb2_grpc.add_PointsServiceServicer_to_server(points, server)
        timeline = Timeline(points, RedemptionHistory(self._database), self._codes, self._refusals)
        redemption_pb2_grpc.add_RedemptionServiceServicer_to_server(
            RedemptionServicer(
                self._redemptions,
                ValidationCodesServicer(self._redemptions, self._codes),
                SupportServicer(self._redemptions, self._refusals, timeline),
                clock,
            ),
            server,
        )
        tombstones = Tombstones(list(self._settings.code_key_bytes().values()))
        known = CustomerTransactions(self._database, quarantine, challenges, tombstones, register_stores=development)
        customers = CustomersServicer(known, UserGroupTransactions(self._database), clock)
        customers_pb2_grpc.add_CustomersServiceServicer_to_server(customers, server)
        self._store_erasures = StoreErasureTransactions(self._database, known, quarantine, clock, self.metrics)
        stores = ProgramsServicer(programs, self._store_erasures, clock)
        programs_pb2_grpc.add_ProgramsServiceServicer_to_server(stores, server)
        benefits = BenefitsServicer(BenefitTransactions(self._database, programs), clock)
        benefits_pb2_grpc.add_BenefitsServiceServicer_to_server(benefits, server)
        replay_ms = int((self._settings.call_deadline_seconds + ABANDONED_SECONDS_MAX) * 1_000)
        replayer = Replayer(quarantine, points, customers, stores, clock, duration_max_ms=replay_ms)
        webhooks = WebhooksServicer(quarantine, replayer, clock)
        webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server(webhooks, server)
        access_pb2_grpc.add_AccessServiceServicer_to_server(AccessServicer(), server)
        self._health.add_to_server(server)
        if development or self._settings.reflection:
            reflection.enable_server_reflection((*SERVICES, HEALTH, reflection.SERVICE_NAME), server)

    def _build_health_server(self, settings: ServerSettings) -> grpc.aio.Server | None:
        """Build the server of health alone, which answers probes when clients hold all connections of the other one."""
        if not settings.health_address:
            return None
        server = grpc.aio.server(options=health_options(reuse_port=settings.workers > 1))
        self._health.add_to_server(server)
        _open_port(server, "POINTBOOK_HEALTH_ADDRESS", settings.health_address, tls_source(settings))
        return server

    def _build_quarantine(self) -> QuarantineTransactions:
        settings = self._settings
        return QuarantineTransactions(
            self._database,
            PayloadCipher(settings.quarantine_key_bytes()),
            QuarantineLimits(
                merchant=Capacity(settings.quarantine_webhooks_max, settings.quarantine_bytes_max),
                shared=Capacity(settings.quarantine_shared_webhooks_max, settings.quarantine_shared_bytes_max),
                total=Capacity(settings.quarantine_total_webhooks_max, settings.quarantine_total_bytes_max),
            ),
            self.metrics,
        )


def _open_port(server: grpc.aio.Server, setting: str, address: str, tls: TlsSource | None) -> int:
    """Open a port, and return its number. Raises OSError, which names the setting."""
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(tls))
    except RuntimeError as error:
        raise OSError(f"{setting}: gRPC cannot listen on {address}") from error


def grpc_options(*, reuse_port: bool, connections_max: int = CONNECTIONS_MAX) -> tuple[tuple[str, int], ...]:
    """Bound what one client can make us hold, and share the port only between workers of one server."""
    return (
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", 4 * MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", 100),
        # This protection counts streams that have ended but are not freed yet, and so refuses calls of a client that
        # keeps to the limit. What a client cancels in haste is bounded by the number of concurrent calls.
        ("grpc.http.overload_protection", 0),
        # gRPC would let every stream send 4 MiB before anything reads it. So it is 64 KiB, until the call is admitted.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS_MAX),
        ("grpc.http2.settings_timeout", HANDSHAKE_MS_MAX),
        ("grpc.max_connection_idle_ms", IDLE_MS_MAX),
        # Streams of health that nobody reads end with their connection. Others find a new one.
        ("grpc.max_connection_age_ms", 30 * 60_000),
        ("grpc.max_connection_age_grace_ms", 60_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def health_options(*, reuse_port: bool) -> tuple[tuple[str, int], ...]:
    """Return the options of a server that answers probes only: the same, with less of everything."""
    return (
        *grpc_options(reuse_port=reuse_port, connections_max=HEALTH_CONNECTIONS_MAX),
        ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    )
