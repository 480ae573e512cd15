"""The time range and the page of requests for lists of past events."""

from dataclasses import dataclass

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import CustomerKey
from pointbook_server.rpc.pagination import PageQuery, PageRequest, read_page
from pointbook_server.rpc.request_fields import TIME_MS_MAX, TIME_MS_MIN, Fields

PagedRequest = redemption_pb2.ListValidationEventsRequest | redemption_pb2.ListRefusalsRequest
HistoryRequest = PagedRequest | redemption_pb2.ListCustomerTimelineRequest


@dataclass(frozen=True, slots=True)
class HistoryWindow:
    """The time range of a customer's history; `scope` identifies the list."""

    start_ms: int
    end_ms: int
    scope: tuple[object, ...]


def read_time_range(fields: Fields, request: HistoryRequest | redemption_pb2.ListRedemptionsRequest) -> tuple[int, int]:
    """Read the start of a range in ms, and its exclusive end; by default all times."""
    start_ms = fields.time_ms("start_time", request.start_time) if request.HasField("start_time") else TIME_MS_MIN
    end_ms = fields.time_ms("end_time", request.end_time) if request.HasField("end_time") else TIME_MS_MAX + 1
    return start_ms, end_ms


def read_window(
    fields: Fields, name: str, request: HistoryRequest, key: CustomerKey | None, *filters: object
) -> HistoryWindow:
    """Read the time range of a list, which `name` and `filters` identify."""
    fields.identifier("merchant_id", request.merchant_id)
    start_ms, end_ms = read_time_range(fields, request)
    return HistoryWindow(start_ms, end_ms, (name, request.merchant_id, str(key), start_ms, end_ms, *filters))


def read_history_page(
    fields: Fields, name: str, request: PagedRequest, key: CustomerKey | None, *filters: object
) -> tuple[PageRequest[tuple[int, str]], PageQuery]:
    """Read a page of a list with one source, and the query that reads its rows."""
    window = read_window(fields, name, request, key, *filters)
    page = read_page(fields, request, window.scope, first=(window.end_ms, ""))
    return page, PageQuery(window.start_ms, *page.after, page.limit)
