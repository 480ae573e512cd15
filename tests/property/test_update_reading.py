"""The fast reading of a points update agrees with the one field by field."""

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.ledger import messages
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.rpc.request_fields import EVENT_ID_LENGTH_MAX, ID_LENGTH_MAX, TIME_MS_MAX, YEAR_2000_MS, Fields
from support.clocks import NOW_MS, at

VISIBLE = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
INT64 = st.integers(-(2**63), 2**63 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT_LENGTHS_MAX = {
    "event_id": EVENT_ID_LENGTH_MAX,
    "merchant_id": ID_LENGTH_MAX,
    "store_id": ID_LENGTH_MAX,
    "buyer_id": ID_LENGTH_MAX,
    "webhook_id": messages.WEBHOOK_ID_LENGTH_MAX,
    "shop_domain": messages.SHOP_DOMAIN_LENGTH_MAX,
    "api_version": messages.API_VERSION_LENGTH_MAX,
}
OPTIONAL_FIELDS = ("points_balance", "points_expiry_time", "updated_at", "webhook")
TIMES_MS_MAX = {"points_expiry_time": TIME_MS_MAX, "updated_at": NOW_MS + DAY_MS}
POINTS_MIN = {"updated_value": 0, "points_balance": -POINTS_MAX}
FIELDS = (
    *TEXT_LENGTHS_MAX,
    *TIMES_MS_MAX,
    *POINTS_MIN,
    "update_type",
    "updated_scene",
    "unrecognized_scene",
    "forget_refusal",
)


def valid_texts(length_max: int) -> st.SearchStrategy[str]:
    """Return texts with the longest and the shortest among them."""
    return st.text(VISIBLE, min_size=1, max_size=length_max) | st.sampled_from(["a", "a" * length_max])


@st.composite
def valid_updates(draw: st.DrawFn) -> points_pb2.PointsUpdate:
    """Draw updates with all fields."""
    texts = {name: draw(valid_texts(length_max)) for name, length_max in TEXT_LENGTHS_MAX.items()}
    return points_pb2.PointsUpdate(
        event_id=texts.pop("event_id"),
        merchant_id=texts.pop("merchant_id"),
        store_id=texts.pop("store_id"),
        buyer_id=texts.pop("buyer_id"),
        update_type=draw(st.sampled_from(points_pb2.PointsUpdateType.values()[1:])),
        updated_scene=draw(st.sampled_from(points_pb2.PointsUpdateScene.values()[1:])),
        updated_value=draw(st.integers(0, POINTS_MAX)),
        points_balance=draw(st.integers(-POINTS_MAX, POINTS_MAX)),
        points_expiry_time=at(draw(st.integers(YEAR_2000_MS, TIME_MS_MAX))),
        updated_at=at(draw(st.integers(YEAR_2000_MS, NOW_MS + DAY_MS))),
        webhook=points_pb2.WebhookMetadata(**texts),
    )


@st.composite
def points_updates(draw: st.DrawFn) -> Any:
    """Draw updates in which a few fields have any value, or none."""
    update: Any = draw(valid_updates())
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True)):
        message = update.webhook if name in {"webhook_id", "shop_domain", "api_version"} else update
        if name in TEXT_LENGTHS_MAX:
            setattr(message, name, draw(any_texts(TEXT_LENGTHS_MAX[name])))
        elif name in TIMES_MS_MAX:
            getattr(message, name).CopyFrom(draw(any_times(TIMES_MS_MAX[name])))
        elif name in POINTS_MIN:
            low = POINTS_MIN[name]
            setattr(message, name, draw(INT64 | st.sampled_from([low - 1, low, POINTS_MAX, POINTS_MAX + 1])))
        elif name == "unrecognized_scene":
            update.unrecognized_scene = draw(st.sampled_from(["", "NEW_SCENE", " "]))
        else:
            setattr(message, name, draw(st.integers(0, 30)) if name != "forget_refusal" else True)
    for name in draw(st.lists(st.sampled_from(OPTIONAL_FIELDS), max_size=2)):
        update.ClearField(name)
    return update


def any_texts(length_max: int) -> st.SearchStrategy[str]:
    """Return texts that may be empty or too long, or have a wrong character."""
    characters = VISIBLE | st.sampled_from("\n \x00\x7fé\u2028")
    edges = st.sampled_from(["", "a" * (length_max + 1), "a\n", "\na", "a\nb"])
    return st.text(characters, max_size=length_max + 1) | edges


def any_times(high_ms: int) -> st.SearchStrategy[Timestamp]:
    """Return times at the bounds of a range, and timestamps that are no times."""
    edges_ms = [0, YEAR_2000_MS - 1, YEAR_2000_MS, high_ms, high_ms + 1]
    edges = st.sampled_from([(time_ms // 1_000, time_ms % 1_000 * 1_000_000) for time_ms in edges_ms])
    nanos = st.sampled_from([-1, 0, 1, 999_999_999, 1_000_000_000]) | INT32
    pairs = st.one_of(edges, st.tuples(INT64, nanos), st.tuples(st.just(NOW_MS // 1_000), nanos))
    return pairs.map(lambda pair: Timestamp(seconds=pair[0], nanos=pair[1]))


@given(points_updates())
def test_both_readings_of_an_update_agree(update: points_pb2.PointsUpdate) -> None:
    fields = Fields()
    by_field = messages.read_received_event(fields, update, NOW_MS)
    at_once = messages.read_valid_update(update, NOW_MS)

    if fields.is_clean and not update.unrecognized_scene:
        assert at_once == by_field
    else:
        assert at_once is None
