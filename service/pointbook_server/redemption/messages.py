"""How what is stored of redemptions is written as messages."""

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.customers.model import key_of_name
from pointbook_server.fields import to_timestamp
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.redeemed import KeptReversal


def write_customer(name: str) -> redemption_pb2.ResolvedCustomer:
    """Build the message of a customer's or a buyer's name."""
    key = key_of_name(name)
    if isinstance(key, AccountKey):
        buyer = identity_pb2.Buyer(store_id=key.store_id, buyer_id=key.buyer_id)
        return redemption_pb2.ResolvedCustomer(buyer=buyer)
    return redemption_pb2.ResolvedCustomer(customer_id=key.value)


def write_reversal(reversal: KeptReversal) -> redemption_pb2.RedemptionReversal:
    """Build the message of a reversal."""
    return redemption_pb2.RedemptionReversal(
        create_time=to_timestamp(reversal.created_at_ms),
        external_reference_number=reversal.reference,
        points=reversal.points,
        notes=reversal.notes,
        actor=reversal.actor,
        redemption_id=reversal.redemption_id,
    )
