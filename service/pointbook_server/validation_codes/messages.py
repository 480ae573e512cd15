"""Translation between the messages about one-time codes and the domain."""

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import IdentifierKind
from pointbook_server.customers.rules import normalize_identifier
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.messages import write_customer
from pointbook_server.rpc.request_fields import YEAR_2000_MS, Fields, to_timestamp, write_timestamp
from pointbook_server.validation_codes.model import IssuedChallenge, MissedCall, ValidationEvent
from pointbook_server.validation_codes.routing import mask_destination

CALL_ID_LENGTH_MAX = 128


def read_missed_call(fields: Fields, request: redemption_pb2.ConfirmMissedCallRequest) -> MissedCall:
    """Read a missed call; violations are added to `fields`."""
    fields.present("call_time", is_present=request.HasField("call_time"))
    return MissedCall(
        merchant_id=fields.identifier("merchant_id", request.merchant_id),
        caller_number=_read_number(fields, "caller_number", request.caller_number),
        called_number=_read_number(fields, "called_number", request.called_number),
        provider_call_id=fields.identifier("provider_call_id", request.provider_call_id, length_max=CALL_ID_LENGTH_MAX),
        call_ms=(
            fields.time_ms("call_time", request.call_time, low=YEAR_2000_MS)
            if request.HasField("call_time")
            else YEAR_2000_MS
        ),
    )


def _read_number(fields: Fields, path: str, value: str) -> str:
    number = normalize_identifier(IdentifierKind.MOBILE, value)
    if number is None:
        fields.wrong(path, "must be a phone number in E.164 form, such as +8613812345678")
    return number or ""


def write_issued_code(issued: IssuedChallenge) -> redemption_pb2.IssuedCode:
    """Build the message of an issued code, without the code.

    A missed call has no destination.
    """
    challenge = issued.challenge
    message = redemption_pb2.IssuedCode(
        challenge_id=challenge.challenge_id,
        sent=issued.sent,
        destination=mask_destination(issued.route) if challenge.channel is not Channel.MISSED_CALL else "",
        missed_call_number=challenge.called_number,
    )
    write_timestamp(message.expire_time, challenge.expires_at_ms)
    write_timestamp(message.resend_time, challenge.may_resend_at_ms)
    return message


def write_validation_event(event: ValidationEvent) -> redemption_pb2.ValidationEvent:
    """Build the message of a validation event."""
    channel = f"VALIDATION_TYPE_{event.channel}" if event.channel else "VALIDATION_TYPE_UNSPECIFIED"
    return redemption_pb2.ValidationEvent(
        time=to_timestamp(event.at_ms),
        action=redemption_pb2.ValidationAction.Value(f"VALIDATION_ACTION_{event.action}"),
        outcome=event.outcome,
        customer=write_customer(event.customer),
        challenge_id=event.challenge_id,
        program_id=event.program_id,
        points=event.points,
        validation_type=redemption_pb2.ValidationType.Value(channel),
        actor=event.actor,
        reason=event.reason,
        count=event.event_count,
        last_time=to_timestamp(event.last_at_ms),
    )
