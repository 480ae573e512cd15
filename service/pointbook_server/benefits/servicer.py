"""The gRPC face of benefits."""

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_server import paging
from pointbook_server.benefits.messages import read_benefit, read_enum, read_level, write_benefit
from pointbook_server.benefits.store import BenefitsStore, Filter
from pointbook_server.clock import Clock
from pointbook_server.fields import ID_LENGTH_MAX, Fields, read_etag

PROGRAM_ID_MAX = 2**63 - 1


class BenefitsServicer(benefits_pb2_grpc.BenefitsServiceServicer):
    """BenefitsService: each method reads its request, asks the store, and writes the answer."""

    def __init__(self, store: BenefitsStore, clock: Clock) -> None:
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
        place = paging.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        found = await self._store.benefits(request.merchant_id, wanted, after=after, limit=size + 1)
        page = paging.fit(map(write_benefit, found), size)
        response = benefits_pb2.ListBenefitsResponse(benefits=page)
        if len(found) > len(page):
            response.next_page_token = paging.write_token(scope, (page[-1].benefit_id,))
        return response

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


def _read_filter(
    fields: Fields,
    request: benefits_pb2.ListBenefitsRequest | benefits_pb2.ListApplicableBenefitsRequest,
    *,
    reward_type: str = "",
    benefits_status: str = "",
    leaves_open: bool = False,
) -> Filter:
    """Read which benefits a list is about."""
    return Filter(
        store_id=fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX),
        program_id=fields.integer("program_id", request.program_id, low=0, high=PROGRAM_ID_MAX),
        level_code=read_level(fields, "level_code", request.level_code),
        membership_type=read_enum(fields, "membership_type", "membership_type", request.membership_type),
        reward_scene=read_enum(fields, "reward_scene", "reward_scene", request.reward_scene),
        reward_type=reward_type,
        benefits_status=benefits_status,
        open=leaves_open,
    )
