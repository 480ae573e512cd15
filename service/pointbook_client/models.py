"""The server's resources with Python types; times are aware and in UTC."""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Self

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_client.identity import Buyer


class ValidationType(StrEnum):
    """How a customer is validated; see the API reference of ValidationType."""

    SMS = "SMS"
    EMAIL = "EMAIL"
    MISSED_CALL = "MISSED_CALL"

    def to_number(self) -> redemption_pb2.ValidationType.ValueType:
        """Return the number of the API."""
        return redemption_pb2.ValidationType.Value(f"VALIDATION_TYPE_{self}")


class RedemptionState(StrEnum):
    """The state of a redemption; see the API reference of RedemptionState."""

    PENDING = "PENDING"
    SETTLED = "SETTLED"
    REVERSED = "REVERSED"
    UNSETTLED = "UNSETTLED"
    UNKNOWN = "UNKNOWN"
    """A state of a newer server."""

    @classmethod
    def from_number(cls, number: int) -> Self:
        """Convert a number of the API."""
        value = redemption_pb2.RedemptionState.DESCRIPTOR.values_by_number.get(number)
        name = value.name.removeprefix("REDEMPTION_STATE_") if value else ""
        return cls(name if name in cls.__members__ else "UNKNOWN")

    def to_number(self) -> redemption_pb2.RedemptionState.ValueType:
        """Return the number of the API. Raises ValueError for UNKNOWN."""
        return redemption_pb2.RedemptionState.Value(f"REDEMPTION_STATE_{self}")


class PointsUpdateType(StrEnum):
    """Whether an entry adds or deducts points."""

    INCREASE = "INCREASE"
    DECREASE = "DECREASE"
    UNKNOWN = "UNKNOWN"
    """A type of a newer server."""

    @classmethod
    def from_number(cls, number: int) -> Self:
        """Convert a number of the API."""
        value = points_pb2.PointsUpdateType.DESCRIPTOR.values_by_number.get(number)
        name = value.name.removeprefix("POINTS_UPDATE_TYPE_") if value else ""
        return cls(name if name in cls.__members__ else "UNKNOWN")

    def to_number(self) -> points_pb2.PointsUpdateType.ValueType:
        """Return the number of the API. Raises ValueError for UNKNOWN."""
        return points_pb2.PointsUpdateType.Value(f"POINTS_UPDATE_TYPE_{self}")


@dataclass(frozen=True, slots=True)
class RedemptionStatus:
    """Why points may or may not be redeemed.

    `code` is Capillary's status code, and `reason` the ErrorReason without its prefix.
    """

    code: int
    reason: str
    message: str
    metadata: dict[str, str]

    @classmethod
    def from_message(cls, message: redemption_pb2.RedemptionStatus) -> Self:
        """Convert a message of the API."""
        return cls(message.code, message.reason, message.message, dict(message.metadata))


@dataclass(frozen=True, slots=True)
class IssuedCode:
    """A one-time code that was sent, or a missed call that is expected.

    The code itself is never returned.
    """

    challenge_id: str
    sent: bool
    """False if the code that was sent before is still valid, or no message was needed."""
    destination: str
    """Masked."""
    expire_time: datetime
    resend_time: datetime | None
    missed_call_number: str

    @classmethod
    def from_message(cls, message: redemption_pb2.IssuedCode) -> Self:
        """Convert a message of the API."""
        return cls(
            challenge_id=message.challenge_id,
            sent=message.sent,
            destination=message.destination,
            expire_time=to_datetime(message.expire_time),
            resend_time=optional_time(message, "resend_time"),
            missed_call_number=message.missed_call_number,
        )


@dataclass(frozen=True, slots=True)
class Validation:
    """Whether points may be redeemed now, and what they are worth."""

    redeemable: bool
    status: RedemptionStatus
    """The first violation, or REDEEMABLE."""
    violations: tuple[RedemptionStatus, ...]
    points: int
    redeem_value: Decimal | None
    redeem_local_value: Decimal | None
    points_currency_ratio: Decimal | None
    active_points: int
    issued_code: IssuedCode | None
    warnings: tuple[RedemptionStatus, ...]

    @classmethod
    def from_message(cls, message: redemption_pb2.ValidateRedemptionResponse) -> Self:
        """Convert a message of the API."""
        return cls(
            redeemable=message.redeemable,
            status=RedemptionStatus.from_message(message.status),
            violations=tuple(map(RedemptionStatus.from_message, message.violations)),
            points=message.points,
            redeem_value=to_decimal(message.redeem_value),
            redeem_local_value=to_decimal(message.redeem_local_value),
            points_currency_ratio=to_decimal(message.points_currency_ratio),
            active_points=message.active_points,
            issued_code=IssuedCode.from_message(message.issued_code) if message.HasField("issued_code") else None,
            warnings=tuple(map(RedemptionStatus.from_message, message.warnings)),
        )


@dataclass(frozen=True, slots=True)
class RedemptionDraw:
    """Points that a redemption takes from one lot of an account."""

    buyer: Buyer
    points: int
    points_expiry_time: datetime | None
    event_id: str

    @classmethod
    def from_message(cls, message: redemption_pb2.RedemptionDraw) -> Self:
        """Convert a message of the API."""
        return cls(
            Buyer.from_message(message.buyer),
            message.points,
            optional_time(message, "points_expiry_time"),
            message.event_id,
        )


@dataclass(frozen=True, slots=True)
class RedemptionReversal:
    """Points of a redemption that were returned to the customer."""

    reference: str
    """The API's external_reference_number of the reversal."""
    points: int
    create_time: datetime
    notes: str
    actor: str

    @classmethod
    def from_message(cls, message: redemption_pb2.RedemptionReversal) -> Self:
        """Convert a message of the API."""
        return cls(
            message.external_reference_number,
            message.points,
            to_datetime(message.create_time),
            message.notes,
            message.actor,
        )


@dataclass(frozen=True, slots=True)
class Redemption:
    """Points that a customer has redeemed."""

    redemption_id: str
    merchant_id: str
    program_id: int
    state: RedemptionState
    points: int
    reversed_points: int
    redeem_value: Decimal | None
    redeem_local_value: Decimal | None
    points_currency_ratio: Decimal | None
    active_points: int
    """The points that were left right after the redemption."""
    current_active_points: int | None
    """The points that are active now, where the method returns them."""
    draws: tuple[RedemptionDraw, ...]
    create_time: datetime
    settle_by: datetime | None
    reference: str
    """The API's external_reference_number."""
    transaction_number: str
    notes: str
    customer_id: str
    """Empty if the redemption is of a buyer without a customer."""
    buyer: Buyer | None
    actor: str
    reversals: tuple[RedemptionReversal, ...]
    """The newest 100, newest first. Only `get_redemption` and `list_redemptions` load them."""
    reversals_truncated: bool
    """Whether there are more."""

    @classmethod
    def from_message(cls, message: redemption_pb2.Redemption) -> Self:
        """Convert a message of the API."""
        has_current = message.HasField("current_active_points")
        has_buyer = message.customer.HasField("buyer")
        return cls(
            redemption_id=message.redemption_id,
            merchant_id=message.merchant_id,
            program_id=message.program_id,
            state=RedemptionState.from_number(message.state),
            points=message.points,
            reversed_points=message.reversed_points,
            redeem_value=to_decimal(message.redeem_value),
            redeem_local_value=to_decimal(message.redeem_local_value),
            points_currency_ratio=to_decimal(message.points_currency_ratio),
            active_points=message.active_points,
            current_active_points=message.current_active_points if has_current else None,
            draws=tuple(map(RedemptionDraw.from_message, message.draws)),
            create_time=to_datetime(message.create_time),
            settle_by=optional_time(message, "settle_by"),
            reference=message.external_reference_number,
            transaction_number=message.transaction_number,
            notes=message.notes,
            customer_id=message.customer.customer_id,
            buyer=Buyer.from_message(message.customer.buyer) if has_buyer else None,
            actor=message.actor,
            reversals=tuple(map(RedemptionReversal.from_message, message.reversals)),
            reversals_truncated=message.reversals_truncated,
        )


@dataclass(frozen=True, slots=True)
class PointsExpiry:
    """Points that expire at one moment."""

    points: int
    time: datetime

    @classmethod
    def from_message(cls, message: points_pb2.PointsExpiry) -> Self:
        """Convert a message of the API."""
        return cls(message.points, to_datetime(message.time))


@dataclass(frozen=True, slots=True)
class CustomerPoints:
    """The points of a customer in a program."""

    points_balance: int
    active_points: int
    held_points: int
    expired_points: int
    lifetime_points: int
    buyers: tuple[Buyer, ...]
    next_expiry: PointsExpiry | None

    @classmethod
    def from_message(cls, message: redemption_pb2.GetCustomerPointsResponse) -> Self:
        """Convert a message of the API."""
        return cls(
            points_balance=message.points_balance,
            active_points=message.active_points,
            held_points=message.held_points,
            expired_points=message.expired_points,
            lifetime_points=message.lifetime_points,
            buyers=tuple(map(Buyer.from_message, message.buyers)),
            next_expiry=PointsExpiry.from_message(message.next_expiry) if message.HasField("next_expiry") else None,
        )


@dataclass(frozen=True, slots=True)
class PointsLot:
    """Points that were added together and expire together."""

    remaining_points: int
    original_points: int
    points_expiry_time: datetime | None
    event_id: str

    @classmethod
    def from_message(cls, message: points_pb2.PointsLot) -> Self:
        """Convert a message of the API."""
        return cls(
            message.remaining_points,
            message.original_points,
            optional_time(message, "points_expiry_time"),
            message.event_id,
        )


@dataclass(frozen=True, slots=True)
class PointsAccount:
    """The points of a buyer in one store."""

    merchant_id: str
    buyer: Buyer
    points_balance: int
    active_points: int
    held_points: int
    expired_points: int
    drift: int
    silently_expired_points: int
    lifetime_points: int
    as_of: datetime
    lots: tuple[PointsLot, ...]
    lots_truncated: bool
    next_expiry: PointsExpiry | None

    @classmethod
    def from_message(cls, message: points_pb2.PointsAccount) -> Self:
        """Convert a message of the API."""
        return cls(
            merchant_id=message.merchant_id,
            buyer=Buyer(message.store_id, message.buyer_id),
            points_balance=message.points_balance,
            active_points=message.active_points,
            held_points=message.held_points,
            expired_points=message.expired_points,
            drift=message.drift,
            silently_expired_points=message.silently_expired_points,
            lifetime_points=message.lifetime_points,
            as_of=to_datetime(message.as_of),
            lots=tuple(map(PointsLot.from_message, message.lots)),
            lots_truncated=message.lots_truncated,
            next_expiry=PointsExpiry.from_message(message.next_expiry) if message.HasField("next_expiry") else None,
        )


@dataclass(frozen=True, slots=True)
class PointsEntry:
    """An event in the ledger of an account."""

    event_id: str
    update_type: PointsUpdateType
    scene: str
    """SHOPLINE's name, such as SUCCESSFUL_ORDERS; empty if only a newer client has it."""
    points: int
    updated_at: datetime
    receive_time: datetime
    points_expiry_time: datetime | None
    balance_before: int
    balance_after: int
    drift: int
    settled_redemption_id: str
    """Empty if the entry settled no redemption."""
    void_reason: str | None
    """The operator's reason, if the entry is void."""

    @classmethod
    def from_message(cls, message: points_pb2.PointsEntry) -> Self:
        """Convert a message of the API."""
        update = message.update
        scene = points_pb2.PointsUpdateScene.DESCRIPTOR.values_by_number.get(update.updated_scene)
        return cls(
            event_id=update.event_id,
            update_type=PointsUpdateType.from_number(update.update_type),
            scene=update.unrecognized_scene or (scene.name.removeprefix("POINTS_UPDATE_SCENE_") if scene else ""),
            points=update.updated_value,
            updated_at=to_datetime(update.updated_at),
            receive_time=to_datetime(message.receive_time),
            points_expiry_time=optional_time(update, "points_expiry_time"),
            balance_before=message.balance_before,
            balance_after=message.balance_after,
            drift=message.drift,
            settled_redemption_id=message.settled_redemption_id,
            void_reason=message.void.reason if message.HasField("void") else None,
        )


@dataclass(frozen=True, slots=True)
class ExpiringPoints:
    """Points that one account loses at one moment."""

    buyer: Buyer
    time: datetime
    points: int

    @classmethod
    def from_message(cls, message: points_pb2.ExpiringPoints) -> Self:
        """Convert a message of the API."""
        return cls(Buyer(message.store_id, message.buyer_id), to_datetime(message.time), message.points)


def to_datetime(timestamp: Timestamp) -> datetime:
    """Convert a time of the API to an aware datetime in UTC.

    >>> to_datetime(Timestamp(seconds=1_700_000_000)).isoformat()
    '2023-11-14T22:13:20+00:00'
    """
    return timestamp.ToDatetime(tzinfo=UTC)


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """Convert an aware datetime to a time of the API.

    Raises ValueError if it has no time zone.
    """
    if time is None:
        return None
    if time.utcoffset() is None:
        raise ValueError("a time needs a time zone, such as datetime.now(UTC)")
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def optional_time(message: Message, field: str) -> datetime | None:
    """Return a time of a message, or None if it is absent."""
    return to_datetime(getattr(message, field)) if message.HasField(field) else None


def to_decimal(text: str) -> Decimal | None:
    """Convert a decimal of the API; an empty one is None."""
    return Decimal(text) if text else None
