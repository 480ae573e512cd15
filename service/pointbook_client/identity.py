"""Who a call is about: customers, their accounts and their groups."""

from dataclasses import dataclass, field
from typing import Any, Self

from pointbook.v1 import identity_pb2
from pointbook_client.keywords import check_type

_IDENTIFIERS = ("mobile", "email", "external_id", "card_number", "card_external_id", "buyer")


@dataclass(frozen=True, slots=True)
class Buyer:
    """A customer of one store, by SHOPLINE's ids."""

    store_id: str
    buyer_id: str

    def __post_init__(self) -> None:
        check_type(str, store_id=self.store_id, buyer_id=self.buyer_id)

    @classmethod
    def from_message(cls, message: identity_pb2.Buyer) -> Self:
        """Convert a message of the API."""
        return cls(message.store_id, message.buyer_id)

    def to_message(self) -> identity_pb2.Buyer:
        """Return the message of the API."""
        return identity_pb2.Buyer(store_id=self.store_id, buyer_id=self.buyer_id)


@dataclass(frozen=True, slots=True)
class CustomerRef:
    """A customer of a merchant, by one identifier.

    >>> CustomerRef("2000001234", mobile="+8613812345678").merchant_id
    '2000001234'
    >>> CustomerRef("2000001234")
    Traceback (most recent call last):
    ValueError: a customer has exactly one of mobile, email, external_id, card_number, card_external_id, buyer
    """

    merchant_id: str
    # Personal data stays out of logs, which may have the text of a reference.
    mobile: str | None = field(default=None, repr=False)
    email: str | None = field(default=None, repr=False)
    external_id: str | None = field(default=None, repr=False)
    card_number: str | None = field(default=None, repr=False)
    card_external_id: str | None = field(default=None, repr=False)
    buyer: Buyer | None = None

    def __post_init__(self) -> None:
        identifiers = self._identifiers()
        if len(identifiers) != 1:
            raise ValueError(f"a customer has exactly one of {', '.join(_IDENTIFIERS)}")
        check_type(str, merchant_id=self.merchant_id)
        check_type(str if self.buyer is None else Buyer, **identifiers)

    def _identifiers(self) -> dict[str, str | Buyer]:
        """Return the identifiers that are set."""
        return {name: value for name in _IDENTIFIERS if (value := getattr(self, name)) is not None}

    def to_message(self) -> identity_pb2.CustomerRef:
        """Return the message of the API."""
        ((name, value),) = self._identifiers().items()
        identifier: Any = value.to_message() if isinstance(value, Buyer) else value
        return identity_pb2.CustomerRef(merchant_id=self.merchant_id, **{name: identifier})
