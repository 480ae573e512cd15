"""The gRPC face of benefits."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime
from functools import partial
from operator import attrgetter
from typing import TypeVar

from google.protobuf.message import Message

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_server.benefits.applicability import (
    Applicability,
    Cart,
    Obstacle,
    ObstacleReason,
    Product,
    applicability_of,
    obstacles_of,
)
from pointbook_server.benefits.messages import (
    USES_MAX,
    read_benefit,
    read_custom_privilege,
    read_enum,
    read_level,
    write_benefit,
    write_custom_privilege,
)
from pointbook_server.benefits.model import Benefit, read_month_day
from pointbook_server.benefits.schedule import (
    YEAR_MAX,
    Issue,
    Member,
    MemberUnknownError,
    ScheduleState,
    preview,
)
from pointbook_server.benefits.transactions import BenefitFilter, BenefitTransactions
from pointbook_server.clock import Clock
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, YEAR_2000_MS, Fields, read_etag, to_timestamp

PROGRAM_ID_MAX = 2**63 - 1
PORTION = 200
"""How many benefits or custom privileges are read at a time."""
ISSUES_MAX = 1_000
ISSUES_DEFAULT = 10
TIME_MS = (YEAR_2000_MS, int(datetime(YEAR_MAX + 1, 1, 1, tzinfo=UTC).timestamp()) * 1_000 - 1)
BIRTHDAY_LENGTH = len("MM-DD")
STATES = {each: benefits_pb2.BenefitScheduleState.Value(f"BENEFIT_SCHEDULE_STATE_{each}") for each in ScheduleState}
PRODUCTS_MAX = 1_000
CATEGORIES_MAX = 100
QUANTITY_MAX = 1_000_000
USES_NAMED_MAX = 1_000
APPLICABILITIES = {
    each: benefits_pb2.BenefitApplicability.Value(f"BENEFIT_APPLICABILITY_{each}") for each in Applicability
}
REASONS = {each: benefits_pb2.BenefitObstacleReason.Value(f"BENEFIT_OBSTACLE_REASON_{each}") for each in ObstacleReason}


M = TypeVar("M", bound=Message)
T = TypeVar("T")


class BenefitsServicer(benefits_pb2_grpc.BenefitsServiceServicer):
    """BenefitsService: each method reads its request, asks the store, and writes the answer."""

    def __init__(self, store: BenefitTransactions, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def PutBenefit(
        self, request: benefits_pb2.PutBenefitRequest, _context: object
    ) -> benefits_pb2.PutBenefitResponse:
        """Create or replace a benefit."""
        fields = Fields()
        fields.present("benefit", is_present=request.HasField("benefit"))
        benefit = read_benefit(fields, request.benefit)
        fields.check()
        revision = await self._store.put(benefit, read_etag(request.etag), self._clock())
        return benefits_pb2.PutBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def GetBenefit(
        self, request: benefits_pb2.GetBenefitRequest, _context: object
    ) -> benefits_pb2.GetBenefitResponse:
        """Answer one benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        benefit, revision = await self._store.benefit(request.merchant_id, request.benefit_id)
        return benefits_pb2.GetBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def ListBenefits(
        self, request: benefits_pb2.ListBenefitsRequest, _context: object
    ) -> benefits_pb2.ListBenefitsResponse:
        """Answer a page of a merchant's benefits."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        wanted = _read_filter(
            fields,
            request,
            reward_type=read_enum(fields, "reward_type", "reward_type", request.reward_type),
            benefits_status=read_enum(fields, "benefits_status", "benefits_status", request.benefits_status),
        )
        size = fields.page_size("page_size", request.page_size)
        scope = ("benefits", request.merchant_id, wanted)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        read = partial(self._store.benefits, request.merchant_id, wanted)
        page, last_id = await _page(read, write_benefit, attrgetter("benefit_id"), size=size, after=after)
        token = pagination.write_token(scope, (last_id,)) if last_id else ""
        return benefits_pb2.ListBenefitsResponse(benefits=page, next_page_token=token)

    async def DeleteBenefit(
        self, request: benefits_pb2.DeleteBenefitRequest, _context: object
    ) -> benefits_pb2.DeleteBenefitResponse:
        """Delete a benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        await self._store.delete(request.merchant_id, request.benefit_id, read_etag(request.etag))
        return benefits_pb2.DeleteBenefitResponse()

    async def PreviewBenefitSchedule(
        self, request: benefits_pb2.PreviewBenefitScheduleRequest, _context: object
    ) -> benefits_pb2.PreviewBenefitScheduleResponse:
        """Compute when a member gets a benefit the next times."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        member = _read_member(fields, request.member)
        start_ms = _read_time(fields, "start_time", request, "start_time")
        issue_count = fields.integer("issue_count", request.issue_count, low=0, high=ISSUES_MAX) or ISSUES_DEFAULT
        fields.check()
        benefit, _ = await self._store.benefit(request.merchant_id, request.benefit_id)
        try:
            found = preview(benefit, member, self._clock() if start_ms is None else start_ms, issue_count)
        except MemberUnknownError as unknown:
            fields.wrong(f"member.{unknown.field}", "is required: the schedule of this benefit goes by it")
            fields.check()
            raise
        return benefits_pb2.PreviewBenefitScheduleResponse(
            schedule_state=STATES[found.state],
            issues=map(_write_issue, found.issues),
            unknown_fields=found.unknown_fields,
        )

    async def ListApplicableBenefits(
        self, request: benefits_pb2.ListApplicableBenefitsRequest, _context: object
    ) -> benefits_pb2.ListApplicableBenefitsResponse:
        """Answer a page of a membership's benefits, and whether each applies to a cart."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        wanted = _read_filter(fields, request, leaves_open=True)
        cart = _read_cart(fields, request)
        size = fields.page_size("page_size", request.page_size)
        scope = ("applicable benefits", request.merchant_id, wanted, cart)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        write = partial(_write_applicable, cart=cart)
        read = partial(self._store.benefits, request.merchant_id, wanted)
        page, last_id = await _page(read, write, attrgetter("benefit_id"), size=size, after=after)
        token = pagination.write_token(scope, (last_id,)) if last_id else ""
        return benefits_pb2.ListApplicableBenefitsResponse(benefits=page, next_page_token=token)

    async def PutCustomPrivilege(
        self, request: benefits_pb2.PutCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.PutCustomPrivilegeResponse:
        """Create or replace a custom privilege."""
        fields = Fields()
        fields.present("custom_privilege", is_present=request.HasField("custom_privilege"))
        privilege = read_custom_privilege(fields, request.custom_privilege)
        fields.check()
        revision = await self._store.put_privilege(privilege, read_etag(request.etag), self._clock())
        return benefits_pb2.PutCustomPrivilegeResponse(
            custom_privilege=write_custom_privilege(privilege), etag=str(revision)
        )

    async def GetCustomPrivilege(
        self, request: benefits_pb2.GetCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.GetCustomPrivilegeResponse:
        """Return one custom privilege."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("privilege_id", request.privilege_id)
        fields.check()
        privilege, revision = await self._store.privilege(request.merchant_id, request.privilege_id)
        return benefits_pb2.GetCustomPrivilegeResponse(
            custom_privilege=write_custom_privilege(privilege), etag=str(revision)
        )

    async def ListCustomPrivileges(
        self, request: benefits_pb2.ListCustomPrivilegesRequest, _context: object
    ) -> benefits_pb2.ListCustomPrivilegesResponse:
        """Return a page of the custom privileges of a level."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        level_code = read_level(fields, "level_code", request.level_code)
        size = fields.page_size("page_size", request.page_size)
        scope = ("custom privileges", merchant_id, level_code)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        read = partial(self._store.privileges, merchant_id, level_code)
        page, last_id = await _page(read, write_custom_privilege, attrgetter("privilege_id"), size=size, after=after)
        token = pagination.write_token(scope, (last_id,)) if last_id else ""
        return benefits_pb2.ListCustomPrivilegesResponse(custom_privileges=page, next_page_token=token)

    async def DeleteCustomPrivilege(
        self, request: benefits_pb2.DeleteCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.DeleteCustomPrivilegeResponse:
        """Delete a custom privilege."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("privilege_id", request.privilege_id)
        fields.check()
        await self._store.delete_privilege(request.merchant_id, request.privilege_id, read_etag(request.etag))
        return benefits_pb2.DeleteCustomPrivilegeResponse()


async def _page(
    read: Callable[..., Awaitable[Sequence[T]]],
    write: Callable[[T], M],
    id_of: Callable[[T], str],
    *,
    size: int,
    after: str,
) -> tuple[list[M], str]:
    """Read a page, and the id behind which the next one starts; empty where there is none.

    It is read in portions: others have their turn in between, and nothing is read that does not fit in.
    """
    page: list[M] = []
    room = pagination.PAGE_BYTES_MAX
    while True:
        count = min(size - len(page), PORTION)
        found = await read(after=after, limit=count + 1)
        portion = pagination.fit(map(write, found), count, room, least=0 if page else 1)
        page += portion
        if len(portion) == len(found):
            return page, ""
        if portion:
            after = id_of(found[len(portion) - 1])
        room -= sum(message.ByteSize() for message in portion)
        if len(portion) < count or len(page) == size:
            return page, after


def _read_cart(fields: Fields, request: benefits_pb2.ListApplicableBenefitsRequest) -> Cart:
    cart = request.cart
    if len(cart.products) > PRODUCTS_MAX:
        fields.wrong("cart.products", f"must have at most {PRODUCTS_MAX:,} items")
    products = [
        _read_product(fields, f"cart.products[{index}]", product)
        for index, product in enumerate(cart.products[:PRODUCTS_MAX])
    ]
    if len({product.product_id for product in products}) < len(products):
        fields.wrong("cart.products", "must name each product once")
    return Cart(
        products=tuple(products),
        amount=fields.decimal("cart.amount", cart.amount, zero_allowed=True),
        points=fields.integer("cart.points", cart.points, low=0, high=POINTS_MAX) if cart.HasField("points") else None,
        automatic_discount_used=cart.automatic_discount_used,
        discount_code_used=cart.discount_code_used,
        uses=_read_uses(fields, dict(request.uses)),
    )


def _read_product(fields: Fields, path: str, product: benefits_pb2.BenefitCartProduct) -> Product:
    categories = fields.each(f"{path}.category_ids", product.category_ids, fields.identifier, count_max=CATEGORIES_MAX)
    return Product(
        product_id=fields.identifier(f"{path}.product_id", product.product_id),
        category_ids=categories,
        quantity=fields.integer(f"{path}.quantity", product.quantity, low=1, high=QUANTITY_MAX),
    )


def _read_uses(fields: Fields, uses: dict[str, int]) -> dict[str, int]:
    if len(uses) > USES_NAMED_MAX:
        fields.wrong("uses", f"must have at most {USES_NAMED_MAX:,} items")
        return {}
    if not all(0 <= count <= USES_MAX for count in uses.values()):
        fields.wrong("uses", f"must be 0 to {USES_MAX:,} each")
    return dict(sorted(uses.items()))


def _read_member(fields: Fields, member: benefits_pb2.BenefitMember) -> Member:
    joined_ms = _read_time(fields, "member.joined_time", member, "joined_time")
    start_ms = _read_time(fields, "member.membership_start_time", member, "membership_start_time")
    end_ms = _read_time(fields, "member.membership_end_time", member, "membership_end_time")
    if end_ms is not None and any(ms is not None and ms >= end_ms for ms in (joined_ms, start_ms)):
        fields.wrong("member.membership_end_time", "must be after joined_time and membership_start_time")
    return Member(
        time_zone=fields.time_zone("member.time_zone", member.time_zone) or "UTC",
        birthday=_read_birthday(fields, "member.birthday", member.birthday),
        joined_ms=joined_ms,
        membership_start_ms=start_ms,
        membership_end_ms=end_ms,
    )


def _read_birthday(fields: Fields, path: str, text: str) -> tuple[int, int] | None:
    """Read a birthday with or without its year, which does not matter, but must have the day."""
    month_day = read_month_day(text[-BIRTHDAY_LENGTH:])
    if text and (month_day is None or (len(text) != BIRTHDAY_LENGTH and not _is_date(text))):
        fields.wrong(path, "must be a day as MM-DD or YYYY-MM-DD, such as 02-29 or 2000-02-29")
    return month_day


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _read_time(fields: Fields, path: str, message: Message, name: str) -> int | None:
    """Read a time that may be absent."""
    low, high = TIME_MS
    return fields.time_ms(path, getattr(message, name), low=low, high=high) if message.HasField(name) else None


def _write_issue(issue: Issue) -> benefits_pb2.BenefitIssue:
    return benefits_pb2.BenefitIssue(
        issue_time=to_timestamp(issue.issue_ms),
        expiry_time=None if issue.expiry_ms is None else to_timestamp(issue.expiry_ms),
    )


def _write_applicable(benefit: Benefit, cart: Cart) -> benefits_pb2.ApplicableBenefit:
    obstacles = obstacles_of(benefit, cart)
    return benefits_pb2.ApplicableBenefit(
        benefit=write_benefit(benefit),
        applicability=APPLICABILITIES[applicability_of(obstacles)],
        obstacles=[_write_obstacle(obstacle) for obstacle in obstacles if obstacle.is_certain],
        uncertainties=[_write_obstacle(obstacle) for obstacle in obstacles if not obstacle.is_certain],
    )


def _write_obstacle(obstacle: Obstacle) -> benefits_pb2.BenefitObstacle:
    return benefits_pb2.BenefitObstacle(
        reason=REASONS[obstacle.reason], field=obstacle.field, limit=obstacle.limit, actual=obstacle.actual
    )


def _read_filter(
    fields: Fields,
    request: benefits_pb2.ListBenefitsRequest | benefits_pb2.ListApplicableBenefitsRequest,
    *,
    reward_type: str = "",
    benefits_status: str = "",
    leaves_open: bool = False,
) -> BenefitFilter:
    """Read which benefits a list is about."""
    return BenefitFilter(
        store_id=fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX),
        program_id=fields.integer("program_id", request.program_id, low=0, high=PROGRAM_ID_MAX),
        level_code=read_level(fields, "level_code", request.level_code),
        membership_type=read_enum(fields, "membership_type", "membership_type", request.membership_type),
        reward_scene=read_enum(fields, "reward_scene", "reward_scene", request.reward_scene),
        reward_type=reward_type,
        benefits_status=benefits_status,
        open=leaves_open,
    )
