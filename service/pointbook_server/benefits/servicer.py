"""The gRPC face of benefits."""

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_server.benefits.messages import read_benefit, write_benefit
from pointbook_server.benefits.store import BenefitsStore
from pointbook_server.clock import Clock
from pointbook_server.fields import Fields, read_etag


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
