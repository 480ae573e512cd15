"""How the requests of lists about a customer's past are read: the newest first, between two times, by pages."""

from dataclasses import dataclass

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import CustomerKey
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import TIME_MS_MAX, TIME_MS_MIN, Fields

HistoryRequest = redemption_pb2.ListValidationEventsRequest | redemption_pb2.ListRefusalsRequest
WindowRequest = HistoryRequest | redemption_pb2.ListCustomerTimelineRequest


@dataclass(frozen=True, slots=True)
class Window:
    """Between which times a list reads, and how long its pages are. The scope is what its tokens are good for."""

    key: CustomerKey | None
    start_ms: int
    end_ms: int
    size: int
    scope: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class History:
    """A page to read of a list with one source."""

    key: CustomerKey | None
    query: pagination.PageQuery
    size: int
    scope: tuple[object, ...]


def read_window(fields: Fields, name: str, request: WindowRequest, key: CustomerKey | None, *filters: object) -> Window:
    """Read which part of a list is wanted, on any page."""
    fields.identifier("merchant_id", request.merchant_id)
    start_ms = fields.time_ms("start_time", request.start_time) if request.HasField("start_time") else TIME_MS_MIN
    end_ms = fields.time_ms("end_time", request.end_time) if request.HasField("end_time") else TIME_MS_MAX + 1
    size = fields.page_size("page_size", request.page_size)
    return Window(key, start_ms, end_ms, size, (name, request.merchant_id, str(key), start_ms, end_ms, *filters))


def read_history(
    fields: Fields, name: str, request: HistoryRequest, key: CustomerKey | None, *filters: object
) -> History:
    """Read which page of a list is wanted; one more row than it has tells whether there is another page."""
    window = read_window(fields, name, request, key, *filters)
    place = pagination.read_token(fields, "page_token", request.page_token, window.scope, (int, str))
    before_ms, before_id = (window.end_ms, "") if place is None else (int(place[0]), str(place[1]))
    query = pagination.PageQuery(window.start_ms, before_ms, before_id, window.size + 1)
    return History(key, query, window.size, window.scope)
