"""The quarantine from an operator's side: a gRPC client that lists, shows, replays and drops webhooks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import typer
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2, webhooks_pb2, webhooks_pb2_grpc
from pointbook_cli.health import local_address
from shopline_shim import translate
from shopline_shim.grpc_channel import open_channel
from shopline_shim.grpc_errors import error_details
from shopline_shim.settings import ShimSettings

CALL_TIMEOUT_SECONDS = 30.0
PAGE_SIZE = 500
REASON_PREFIX = "QUARANTINE_REASON_"
STATE_PREFIX = "QUARANTINE_STATE_"
DOUBTFUL = frozenset({webhooks_pb2.QUARANTINE_REASON_ENDPOINT_MISMATCH, webhooks_pb2.QUARANTINE_REASON_TOO_OLD})
"""Reasons that a captured webhook has too: to apply such ones is a decision, not a repetition."""
# After these the next webhook would fare no better.
HOPELESS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.DEADLINE_EXCEEDED})


class NotReplayedError(Exception):
    """A webhook that stays in quarantine; the message says why."""


@dataclass(frozen=True, slots=True)
class WebhookFilter:
    """Which webhooks to list, by the names of the API without their prefixes."""

    state: str = "QUARANTINED"
    reason: str = "UNSPECIFIED"
    topic: str = ""
    since: datetime | None = None
    until: datetime | None = None


class Quarantine:
    """The quarantine of one merchant on a server."""

    def __init__(self, channel: grpc.Channel, token: str, merchant_id: str) -> None:
        self._webhooks = webhooks_pb2_grpc.WebhooksServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._merchant_id = merchant_id

    def webhooks(self, wanted: WebhookFilter) -> Iterator[webhooks_pb2.QuarantinedWebhook]:
        """List webhooks without their content, the oldest first, through all pages."""
        request = webhooks_pb2.ListQuarantinedWebhooksRequest(
            merchant_id=self._merchant_id,
            state=webhooks_pb2.QuarantineState.Value(STATE_PREFIX + wanted.state),
            reason=webhooks_pb2.QuarantineReason.Value(REASON_PREFIX + wanted.reason),
            topic=wanted.topic,
            page_size=PAGE_SIZE,
        )
        if wanted.since is not None:
            request.start_time.FromDatetime(wanted.since.replace(tzinfo=UTC))
        if wanted.until is not None:
            request.end_time.FromDatetime(wanted.until.replace(tzinfo=UTC))
        while True:
            page = self._webhooks.ListQuarantinedWebhooks(
                request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata
            )
            yield from page.webhooks
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def waiting(self, reason: str) -> list[str]:
        """Return the ids of all that may be replayed together: of one reason, or of all but the doubtful ones."""
        found = self.webhooks(WebhookFilter(reason=reason or "UNSPECIFIED"))
        return [webhook.quarantine_id for webhook in found if reason or webhook.reason not in DOUBTFUL]

    def get(self, quarantine_id: str) -> webhooks_pb2.QuarantinedWebhook:
        """Read one webhook, whole."""
        request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=self._merchant_id, quarantine_id=quarantine_id)
        answer = self._webhooks.GetQuarantinedWebhook(request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata)
        return answer.webhook

    def replay(self, quarantine_id: str, as_merchant: str, as_topic: str, *, override: bool) -> str:
        """Translate a webhook again and apply it; returns the outcome. Raises NotReplayedError."""
        try:
            request = translate_again(self.get(quarantine_id), as_merchant, as_topic)
            request.merchant_id, request.quarantine_id = self._merchant_id, quarantine_id
            request.overrides_contradiction = override
            answer = self._webhooks.ReplayQuarantinedWebhook(
                request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError as error:
            if error.code() in HOPELESS and error_details(error)[0].reason != "CODE_KEY_UNKNOWN":
                raise
            raise NotReplayedError(explain(error)) from None
        if answer.HasField("points_update"):
            return points_pb2.ApplyOutcome.Name(answer.points_update.outcome).removeprefix("APPLY_OUTCOME_")
        if answer.HasField("store_erasure"):
            requested = programs_pb2.StoreErasureOutcome.Name(answer.store_erasure.outcome)
            return requested.removeprefix("STORE_ERASURE_OUTCOME_")
        outcome = customers_pb2.CustomerUpdateOutcome.Name(answer.customer_update.outcome)
        return outcome.removeprefix("CUSTOMER_UPDATE_OUTCOME_")

    def drop(self, quarantine_id: str, reason: str) -> None:
        """Delete a webhook for good."""
        request = webhooks_pb2.DropQuarantinedWebhookRequest(
            merchant_id=self._merchant_id, quarantine_id=quarantine_id, reason=reason
        )
        self._webhooks.DropQuarantinedWebhook(request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata)


@contextlib.contextmanager
def opened(settings: ShimSettings, merchant_id: str) -> Iterator[Quarantine]:
    """Open a merchant's quarantine on the server that the settings name. Raises OSError with what the server says."""
    with open_channel(settings, local_address(settings.grpc_address)) as channel:
        try:
            yield Quarantine(channel, settings.token.get_secret_value(), merchant_id)
        except grpc.RpcError as error:
            raise OSError(explain(error)) from error


def translate_again(
    webhook: webhooks_pb2.QuarantinedWebhook, as_merchant: str = "", as_topic: str = ""
) -> webhooks_pb2.ReplayQuarantinedWebhookRequest:
    """Translate a webhook with the shim's own code, in the name of another merchant if one is given.

    `as_topic` is the topic of a webhook that names none; every other webhook keeps its own. Raises NotReplayedError.
    """
    if webhook.body_erased:
        raise NotReplayedError("its body was erased with its customer")
    topic = webhook.topic or as_topic
    if not topic:
        raise NotReplayedError("it names no topic: choose one with --as-topic")
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
    raise NotReplayedError(f"nothing translates the topic {topic}")


def replay_all(
    quarantine: Quarantine, quarantine_ids: Sequence[str], as_merchant: str, as_topic: str, *, override: bool
) -> bool:
    """Replay webhooks and tell what became of each, with a progress bar on a terminal; False where some are refused."""
    replayed = refused = 0
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for quarantine_id in progress.track(quarantine_ids, description="Replaying"):
            try:
                outcome = quarantine.replay(quarantine_id, as_merchant, as_topic, override=override)
            except NotReplayedError as error:
                refused += 1
                console.print(printable(f"{quarantine_id}  refused  {error}"))
            else:
                replayed += 1
                console.print(f"{quarantine_id}  {outcome}")
    typer.echo(f"{replayed} replayed, {refused} still refused.")
    return not refused


def line_of(webhook: webhooks_pb2.QuarantinedWebhook) -> str:
    """Write a webhook as one line of a list."""
    reason = webhooks_pb2.QuarantineReason.Name(webhook.reason).removeprefix(REASON_PREFIX)
    received = f"{webhook.receive_time.ToJsonString()} x{webhook.receive_count}"
    topic = webhook.topic or "(none)"
    return printable(f"{webhook.quarantine_id}  {received}  {reason}  {topic}  {webhook.detail}")


def text_of(webhook: webhooks_pb2.QuarantinedWebhook) -> str:
    """Write a webhook for people: what is known of it, its headers and its body, safe for a terminal."""
    state = webhooks_pb2.QuarantineState.Name(webhook.state).removeprefix(STATE_PREFIX)
    lines = [
        line_of(webhook),
        f"merchant: {printable(webhook.merchant_id) or '(none)'}",
        f"state: {state} {webhook.replay_time.ToJsonString() if webhook.HasField('replay_time') else ''}".rstrip(),
        f"last received: {webhook.last_receive_time.ToJsonString()}",
        f"body: {'erased' if webhook.body_erased else f'{webhook.body_size:,} bytes'}",
        "",
        *(printable(f"{header.name}: {header.value}") for header in webhook.headers),
        "",
    ]
    body = webhook.body.decode(errors="backslashreplace")
    return "\n".join([*lines, *map(printable, body.split("\n"))])


def printable(text: str) -> str:
    """Escape whatever could move a terminal's cursor, hide text or turn its direction."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def names_of(enum: str) -> list[str]:
    """Tell the names of an enum of webhooks.proto that an operator may write."""
    values = webhooks_pb2.DESCRIPTOR.enum_types_by_name[enum].values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix) for value in values[1:]]


def explain(error: grpc.RpcError) -> str:
    """Tell an error of the server in one line."""
    info, bad_request = error_details(error)
    wrong = "; ".join(f"{violation.field} {violation.description}" for violation in bad_request.field_violations)
    text = " ".join((error.details() or "").split())
    return printable(f"{info.reason or error.code().name}: {wrong or text}")
