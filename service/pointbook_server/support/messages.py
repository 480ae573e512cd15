"""Translation between the messages of support and the domain."""

from pointbook.v1 import redemption_pb2
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.assessment import RedemptionContext, own_sources
from pointbook_server.redemption.messages import write_buyer, write_customer
from pointbook_server.redemption.model import Closing
from pointbook_server.redemption.refusal import Refusal, RefusedMethod
from pointbook_server.rpc.request_fields import to_timestamp
from pointbook_server.validation_codes.routing import mask_destination, route_by

METHODS = {
    RefusedMethod.VALIDATE: redemption_pb2.REFUSED_METHOD_VALIDATE_REDEMPTION,
    RefusedMethod.ISSUE: redemption_pb2.REFUSED_METHOD_ISSUE_VALIDATION_CODE,
    RefusedMethod.REDEEM: redemption_pb2.REFUSED_METHOD_REDEEM_POINTS,
}

CLOSING_ACTIONS = {
    "SETTLE": redemption_pb2.CLOSING_ACTION_SETTLE,
    "RELEASE": redemption_pb2.CLOSING_ACTION_RELEASE,
}


def write_refusal(refusal: Refusal) -> redemption_pb2.Refusal:
    """Build the message of a refused call."""
    violations = [
        redemption_pb2.RedemptionStatus(
            code=reason.code, reason=reason.reason, message=reason.message, metadata=reason.metadata
        )
        for reason in refusal.reasons
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
    """Build the message of closed holds."""
    return redemption_pb2.RedemptionClosing(
        time=to_timestamp(closing.at_ms),
        redemption_id=closing.redemption_id,
        action=CLOSING_ACTIONS[closing.action],
        points=closing.points,
        reason=closing.reason,
        actor=closing.actor,
    )


def write_timeline_customer(context: RedemptionContext) -> redemption_pb2.TimelineCustomer:
    """Build the message of a customer with masked contacts."""
    customer = context.customer
    contacts = {channel: mask_destination(route_by(customer, channel)) for channel in (Channel.SMS, Channel.EMAIL)}
    return redemption_pb2.TimelineCustomer(
        customer=write_customer(context.redeemer),
        buyers=[write_buyer(source.key) for source in own_sources(context.key, customer)],
        masked_mobile=contacts[Channel.SMS],
        masked_email=contacts[Channel.EMAIL],
        fraud_blocked=customer is not None and customer.fraud_blocked,
    )
