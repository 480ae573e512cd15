"""The paging fields of the lists about a customer's history."""

from dataclasses import dataclass

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import CustomerKey
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import TIME_MS_MAX, TIME_MS_MIN, Fields

PagedRequest = redemption_pb2.ListValidationEventsRequest | redemption_pb2.ListRefusalsRequest
HistoryRequest = PagedRequest | redemption_pb2.ListCustomerTimelineRequest


@dataclass(frozen=True, slots=True)
class HistoryWindow:
    """The time range and page size of a list; `scope` binds its page tokens."""

    start_ms: int
    end_ms: int
    size: int
    scope: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One page of a list that has a single source."""

    query: pagination.PageQuery
    size: int
    scope: tuple[object, ...]


def read_window(
    fields: Fields, name: str, request: HistoryRequest, key: CustomerKey | None, *filters: object
) -> HistoryWindow:
    """Read the time range and the page size of a list."""
    fields.identifier("merchant_id", request.merchant_id)
    start_ms = fields.time_ms("start_time", request.start_time) if request.HasField("start_time") else TIME_MS_MIN
    end_ms = fields.time_ms("end_time", request.end_time) if request.HasField("end_time") else TIME_MS_MAX + 1
    size = fields.page_size("page_size", request.page_size)
    return HistoryWindow(start_ms, end_ms, size, (name, request.merchant_id, str(key), start_ms, end_ms, *filters))


def read_page_request(
    fields: Fields, name: str, request: PagedRequest, key: CustomerKey | None, *filters: object
) -> PageRequest:
    """Read a page of a list.

    Its query has one more row than the page, which shows whether another page follows.
    """
    window = read_window(fields, name, request, key, *filters)
    position = pagination.read_token(fields, "page_token", request.page_token, window.scope, (int, str))
    before_ms, before_id = (window.end_ms, "") if position is None else (int(position[0]), str(position[1]))
    query = pagination.PageQuery(window.start_ms, before_ms, before_id, window.size + 1)
    return PageRequest(query, window.size, window.scope)
