"""Merchants with a store."""

from dataclasses import dataclass
from typing import Any

from pointbook.v1 import points_pb2
from support.clocks import NOW_MS, at
from support.unique_names import unique


@dataclass(frozen=True)
class Shop:
    """A merchant with one registered store, for one test."""

    merchant_id: str
    store_id: str

    def update(self, buyer_id: str = "buyer", **changes: Any) -> points_pb2.PointsUpdate:
        """Build a points update, by default 20 points for a new buyer's registration."""
        values: dict[str, Any] = {
            "event_id": unique("event"),
            "merchant_id": self.merchant_id,
            "store_id": self.store_id,
            "buyer_id": buyer_id,
            "update_type": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
            "updated_scene": points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION,
            "updated_value": 20,
            "points_balance": 20,
            "updated_at": at(NOW_MS - 60_000),
        }
        values |= changes
        return points_pb2.PointsUpdate(**{name: value for name, value in values.items() if value is not None})
