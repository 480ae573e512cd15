"""A gRPC client of the quarantine: it lists, shows, replays and drops webhooks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import typer
from rich.progress import Progress

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2, webhooks_pb2
from pointbook_cli.server_access import describe_error, open_client
from pointbook_cli.terminal import escape_unprintable, plain_console
from pointbook_client import (
    CallCancelledError,
    DeadlineExceededError,
    PointbookError,
    UnauthenticatedError,
    UnavailableError,
    reasons,
)
from pointbook_client.sync import PointbookClient
from shopline_shim import translate
from shopline_shim.settings import ShimSettings

PAGE_SIZE = 500
REASON_PREFIX = "QUARANTINE_REASON_"
STATE_PREFIX = "QUARANTINE_STATE_"
SUSPICIOUS = frozenset({webhooks_pb2.QUARANTINE_REASON_ENDPOINT_MISMATCH, webhooks_pb2.QUARANTINE_REASON_TOO_OLD})
"""Reasons that a captured webhook can have too: applying such webhooks needs a decision for each reason."""
CALL_FAILURES = (UnavailableError, UnauthenticatedError, DeadlineExceededError, CallCancelledError)
"""Errors that the next webhook would get too."""


class NotReplayedError(Exception):
    """A webhook that stays in quarantine; the message is the cause."""


@dataclass(frozen=True, slots=True)
class WebhookFilter:
    """A filter of webhooks; state and reason are enum names without their prefixes."""

    state: str = "QUARANTINED"
    reason: str = "UNSPECIFIED"
    topic: str = ""
    since: datetime | None = None
    until: datetime | None = None


class Quarantine:
    """The quarantine of one merchant on a server."""

    def __init__(self, client: PointbookClient, merchant_id: str) -> None:
        self._client = client
        self._merchant_id = merchant_id

    def webhooks(self, criteria: WebhookFilter) -> Iterator[webhooks_pb2.QuarantinedWebhook]:
        """List webhooks of all pages without their content, oldest first."""
        request = webhooks_pb2.ListQuarantinedWebhooksRequest(
            merchant_id=self._merchant_id,
            state=webhooks_pb2.QuarantineState.Value(STATE_PREFIX + criteria.state),
            reason=webhooks_pb2.QuarantineReason.Value(REASON_PREFIX + criteria.reason),
            topic=criteria.topic,
            page_size=PAGE_SIZE,
        )
        if criteria.since is not None:
            request.start_time.FromDatetime(criteria.since.replace(tzinfo=UTC))
        if criteria.until is not None:
            request.end_time.FromDatetime(criteria.until.replace(tzinfo=UTC))
        for page in self._client.pages(self._client.webhooks.ListQuarantinedWebhooks, request):
            yield from page.webhooks

    def replayable_ids(self, reason: str) -> list[str]:
        """Return the ids of the webhooks to replay together.

        They are those of a reason, or all but the suspicious ones.
        """
        webhooks = self.webhooks(WebhookFilter(reason=reason or "UNSPECIFIED"))
        return [webhook.quarantine_id for webhook in webhooks if reason or webhook.reason not in SUSPICIOUS]

    def get(self, quarantine_id: str) -> webhooks_pb2.QuarantinedWebhook:
        """Read a webhook with its content."""
        request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=self._merchant_id, quarantine_id=quarantine_id)
        return self._client.webhooks.GetQuarantinedWebhook(request).webhook

    def replay(self, quarantine_id: str, as_merchant: str, as_topic: str, *, override: bool) -> str:
        """Translate a webhook again and apply it; return the outcome.

        Raises NotReplayedError.
        """
        try:
            request = translate_again(self.get(quarantine_id), as_merchant, as_topic)
            request.merchant_id, request.quarantine_id = self._merchant_id, quarantine_id
            request.overrides_contradiction = override
            response = self._client.webhooks.ReplayQuarantinedWebhook(request)
        except PointbookError as error:
            if isinstance(error, CALL_FAILURES) and not isinstance(error, reasons.CodeKeyUnknownError):
                raise
            raise NotReplayedError(describe_error(error)) from None
        if response.HasField("points_update"):
            return points_pb2.ApplyOutcome.Name(response.points_update.outcome).removeprefix("APPLY_OUTCOME_")
        if response.HasField("store_erasure"):
            outcome = programs_pb2.StoreErasureOutcome.Name(response.store_erasure.outcome)
            return outcome.removeprefix("STORE_ERASURE_OUTCOME_")
        name = customers_pb2.CustomerUpdateOutcome.Name(response.customer_update.outcome)
        return name.removeprefix("CUSTOMER_UPDATE_OUTCOME_")

    def drop(self, quarantine_id: str, reason: str) -> None:
        """Delete a webhook permanently."""
        request = webhooks_pb2.DropQuarantinedWebhookRequest(
            merchant_id=self._merchant_id, quarantine_id=quarantine_id, reason=reason
        )
        self._client.webhooks.DropQuarantinedWebhook(request)


@contextlib.contextmanager
def open_quarantine(settings: ShimSettings, merchant_id: str) -> Iterator[Quarantine]:
    """Open a merchant's quarantine on the server in the settings.

    Raises OSError with the server's error.
    """
    with open_client(settings) as client:
        yield Quarantine(client, merchant_id)


def translate_again(
    webhook: webhooks_pb2.QuarantinedWebhook, as_merchant: str = "", as_topic: str = ""
) -> webhooks_pb2.ReplayQuarantinedWebhookRequest:
    """Translate a webhook with the shim's code, for another merchant if one is given.

    `as_topic` is the topic of a webhook that names none. Raises NotReplayedError.
    """
    if webhook.body_erased:
        raise NotReplayedError("its body was erased with its customer")
    topic = webhook.topic or as_topic
    if not topic:
        raise NotReplayedError("it names no topic; set one with --as-topic")
    headers = {header.name.lower(): header.value for header in webhook.headers}
    if as_merchant:
        headers["x-shopline-merchant-id"] = as_merchant
    try:
        if topic == translate.POINTS_TOPIC:
            points = translate.points_update(headers, webhook.body)
            return webhooks_pb2.ReplayQuarantinedWebhookRequest(points_update=points)
        if topic == translate.STORE_ERASURE_TOPIC:
            erasure = translate.store_erasure(headers, webhook.body)
            return webhooks_pb2.ReplayQuarantinedWebhookRequest(store_erasure=erasure)
        if topic in translate.CUSTOMER_TOPICS:
            customer = translate.customer_update(topic, headers, webhook.body)
            return webhooks_pb2.ReplayQuarantinedWebhookRequest(customer_update=customer)
    except translate.MalformedWebhook as malformed:
        raise NotReplayedError(str(malformed)) from None
    raise NotReplayedError(f"the topic {topic} is not supported")


def replay_all(
    quarantine: Quarantine, quarantine_ids: Sequence[str], as_merchant: str, as_topic: str, *, override: bool
) -> bool:
    """Replay webhooks and print each outcome, with a progress bar on a terminal.

    Return whether all succeeded.
    """
    replayed = refused = 0
    console = plain_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for quarantine_id in progress.track(quarantine_ids, description="Replaying"):
            try:
                outcome = quarantine.replay(quarantine_id, as_merchant, as_topic, override=override)
            except NotReplayedError as error:
                refused += 1
                console.print(escape_unprintable(f"{quarantine_id}  refused  {error}"))
            else:
                replayed += 1
                console.print(f"{quarantine_id}  {outcome}")
    typer.echo(f"{replayed} replayed, {refused} still refused.")
    return not refused


def format_line(webhook: webhooks_pb2.QuarantinedWebhook) -> str:
    """Return a webhook as one line of a list."""
    reason = webhooks_pb2.QuarantineReason.Name(webhook.reason).removeprefix(REASON_PREFIX)
    received = f"{webhook.receive_time.ToJsonString()} x{webhook.receive_count}"
    topic = webhook.topic or "(none)"
    return escape_unprintable(f"{webhook.quarantine_id}  {received}  {reason}  {topic}  {webhook.detail}")


def format_webhook(webhook: webhooks_pb2.QuarantinedWebhook) -> str:
    """Return a webhook's state, headers and body as text, safe for a terminal."""
    state = webhooks_pb2.QuarantineState.Name(webhook.state).removeprefix(STATE_PREFIX)
    lines = [
        format_line(webhook),
        f"merchant: {escape_unprintable(webhook.merchant_id) or '(none)'}",
        f"state: {state} {webhook.replay_time.ToJsonString() if webhook.HasField('replay_time') else ''}".rstrip(),
        f"last received: {webhook.last_receive_time.ToJsonString()}",
        f"body: {'erased' if webhook.body_erased else f'{webhook.body_size:,} bytes'}",
        "",
        *(escape_unprintable(f"{header.name}: {header.value}") for header in webhook.headers),
        "",
    ]
    body = webhook.body.decode(errors="backslashreplace")
    return "\n".join([*lines, *map(escape_unprintable, body.split("\n"))])


def enum_names(enum: str) -> list[str]:
    """Return the values of an enum of webhooks.proto.

    They have no prefix; UNSPECIFIED is omitted.
    """
    values = webhooks_pb2.DESCRIPTOR.enum_types_by_name[enum].values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix) for value in values[1:]]
