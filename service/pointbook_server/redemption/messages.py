"""How what is stored of redemptions is written as messages."""

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.customers.model import key_of_ref
from pointbook_server.ledger.model import AccountKey
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.assessment import RedemptionContext, own_sources
from pointbook_server.redemption.model import Closing, StoredReversal
from pointbook_server.redemption.refused import Refusal, RefusedMethod
from pointbook_server.rpc.request_fields import to_timestamp
from pointbook_server.validation_codes.model import ValidationEvent, masked, route_to

METHODS = {
    RefusedMethod.VALIDATE: redemption_pb2.REFUSED_METHOD_VALIDATE_REDEMPTION,
    RefusedMethod.ISSUE: redemption_pb2.REFUSED_METHOD_ISSUE_VALIDATION_CODE,
    RefusedMethod.REDEEM: redemption_pb2.REFUSED_METHOD_REDEEM_POINTS,
}

CLOSING_ACTIONS = {
    "SETTLE": redemption_pb2.CLOSING_ACTION_SETTLE,
    "RELEASE": redemption_pb2.CLOSING_ACTION_RELEASE,
}


def write_customer(name: str) -> redemption_pb2.ResolvedCustomer:
    """Build the message of a customer's or a buyer's name."""
    key = key_of_ref(name)
    if isinstance(key, AccountKey):
        buyer = identity_pb2.Buyer(store_id=key.store_id, buyer_id=key.buyer_id)
        return redemption_pb2.ResolvedCustomer(buyer=buyer)
    return redemption_pb2.ResolvedCustomer(customer_id=key.value)


def write_reversal(reversal: StoredReversal) -> redemption_pb2.RedemptionReversal:
    """Build the message of a reversal."""
    return redemption_pb2.RedemptionReversal(
        create_time=to_timestamp(reversal.created_at_ms),
        external_reference_number=reversal.reference,
        points=reversal.points,
        notes=reversal.notes,
        actor=reversal.actor,
        redemption_id=reversal.redemption_id,
    )


def write_event(event: ValidationEvent) -> redemption_pb2.ValidationEvent:
    """Build the message of what happened to a code."""
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


def write_refusal(refusal: Refusal) -> redemption_pb2.Refusal:
    """Build the message of a refused call."""
    violations = [
        redemption_pb2.RedemptionStatus(code=each.code, reason=each.reason, message=each.message, metadata=each.values)
        for each in refusal.reasons
    ]
    return redemption_pb2.Refusal(
        time=to_timestamp(refusal.at_ms),
        method=METHODS[refusal.method],
        customer=write_customer(refusal.customer),
        program_id=refusal.program_id,
        points=refusal.points,
        active_points=refusal.active_points,
        status=violations[0],
        violations=violations,
        external_reference_number=refusal.reference,
        actor=refusal.actor,
    )


def write_closing(closing: Closing) -> redemption_pb2.RedemptionClosing:
    """Build the message of holds that were closed."""
    return redemption_pb2.RedemptionClosing(
        time=to_timestamp(closing.at_ms),
        redemption_id=closing.redemption_id,
        action=CLOSING_ACTIONS[closing.action],
        points=closing.points,
        reason=closing.reason,
        actor=closing.actor,
    )


def write_timeline_customer(facts: RedemptionContext) -> redemption_pb2.TimelineCustomer:
    """Build the message of a customer with masked contacts."""
    customer = facts.customer
    contacts = {channel: masked(route_to(customer, channel)) for channel in (Channel.SMS, Channel.EMAIL)}
    return redemption_pb2.TimelineCustomer(
        customer=write_customer(facts.redeemer),
        buyers=[
            identity_pb2.Buyer(store_id=source.key.store_id, buyer_id=source.key.buyer_id)
            for source in own_sources(facts.key, customer)
        ],
        masked_mobile=contacts[Channel.SMS],
        masked_email=contacts[Channel.EMAIL],
        fraud_blocked=customer is not None and customer.fraud_blocked,
    )
