"""WebhooksService: the gRPC methods of the quarantine."""

import time

import structlog

from pointbook.v1 import webhooks_pb2, webhooks_pb2_grpc
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.pagination import read_page
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, Fields
from pointbook_server.webhooks.messages import read_filter, read_key, read_visibility, read_webhook, write_webhook
from pointbook_server.webhooks.model import Webhook
from pointbook_server.webhooks.replay import Replayer
from pointbook_server.webhooks.transactions import QuarantineTransactions

QUARANTINE_PAGE_BYTES_MAX = 1024 * 1024 - 4 * 1024
"""1 MiB, less the space for next_page_token and the framing of the webhooks."""
QUARANTINE_FULL_RETRY_SECONDS = 60.0
"""An operator must make space first."""
QUARANTINE_FULL_LOG_SECONDS = 60.0
"""A server logs a full quarantine once in this time, because senders decide how many webhooks are refused."""

log = structlog.get_logger()


class WebhooksServicer(webhooks_pb2_grpc.WebhooksServiceServicer):
    """WebhooksService: the quarantine of webhooks that could not be applied."""

    def __init__(self, quarantine: QuarantineTransactions, replayer: Replayer, clock: Clock) -> None:
        self._quarantine = quarantine
        self._replayer = replayer
        self._clock = clock
        self._log_full_again_at = float("-inf")
        self._refused_since_log = 0

    async def QuarantineWebhook(
        self, request: webhooks_pb2.QuarantineWebhookRequest, _context: object
    ) -> webhooks_pb2.QuarantineWebhookResponse:
        """Store a webhook, or count its repetition."""
        webhook = read_webhook(request, self._clock())
        stored = await self._quarantine.add(webhook)
        if stored is None:
            self._log_full(webhook)
            raise PointbookError(
                Reason.QUEUE_FULL,
                "The quarantine is full; drop webhooks that are no longer needed.",
                retry_after_seconds=QUARANTINE_FULL_RETRY_SECONDS,
            )
        return webhooks_pb2.QuarantineWebhookResponse(
            quarantine_id=stored.quarantine_id, already_quarantined=stored.is_repetition
        )

    async def ListQuarantinedWebhooks(
        self, request: webhooks_pb2.ListQuarantinedWebhooksRequest, _context: object
    ) -> webhooks_pb2.ListQuarantinedWebhooksResponse:
        """Return a page of a merchant's quarantine, the oldest first."""
        fields = Fields()
        merchant_id = fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX)
        webhook_filter = read_filter(fields, request)
        scope = ("quarantine", merchant_id, webhook_filter)
        page = read_page(fields, request, scope, first=(webhook_filter.start_ms, ""))
        fields.check()
        webhooks = await self._quarantine.list_webhooks(
            read_visibility(merchant_id), webhook_filter, after=page.after, limit=page.limit
        )
        messages, next_page_token = page.build(
            webhooks,
            write_webhook,
            lambda webhook: (webhook.received_at_ms, webhook.quarantine_id),
            bytes_max=QUARANTINE_PAGE_BYTES_MAX,
        )
        return webhooks_pb2.ListQuarantinedWebhooksResponse(webhooks=messages, next_page_token=next_page_token)

    async def GetQuarantinedWebhook(
        self, request: webhooks_pb2.GetQuarantinedWebhookRequest, _context: object
    ) -> webhooks_pb2.GetQuarantinedWebhookResponse:
        """Return one webhook with its content."""
        fields = Fields()
        merchant_id, quarantine_id = read_key(fields, request)
        fields.check()
        quarantined, content = await self._quarantine.get(read_visibility(merchant_id), quarantine_id)
        return webhooks_pb2.GetQuarantinedWebhookResponse(webhook=write_webhook(quarantined, content))

    async def ReplayQuarantinedWebhook(
        self, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Apply the update of a webhook once, and mark the webhook as replayed."""
        return await self._replayer.replay(request, context)

    async def DropQuarantinedWebhook(
        self, request: webhooks_pb2.DropQuarantinedWebhookRequest, _context: object
    ) -> webhooks_pb2.DropQuarantinedWebhookResponse:
        """Delete a webhook permanently, and log the given reason."""
        fields = Fields()
        merchant_id, quarantine_id = read_key(fields, request)
        drop_reason = fields.reason("reason", request.reason)
        fields.check()
        quarantine_reason = await self._quarantine.drop(read_visibility(merchant_id), quarantine_id)
        log.warning(
            "audit: quarantined webhook dropped",
            merchant_id=merchant_id,
            quarantine_id=quarantine_id,
            quarantine_reason=quarantine_reason.value,
            drop_reason=drop_reason,
        )
        return webhooks_pb2.DropQuarantinedWebhookResponse()

    def _log_full(self, webhook: Webhook) -> None:
        """Log that a quarantine is full, and how many webhooks were refused meanwhile."""
        self._refused_since_log += 1
        now = time.monotonic()
        if now >= self._log_full_again_at:
            log.error(
                "the quarantine is full",
                merchant_id=webhook.merchant_id,
                reason=webhook.reason.value,
                refused=self._refused_since_log,
            )
            self._log_full_again_at, self._refused_since_log = now + QUARANTINE_FULL_LOG_SECONDS, 0
