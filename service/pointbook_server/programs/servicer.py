"""The gRPC face of stores and programs."""

from typing import Any

import structlog

from pointbook.v1 import programs_pb2, programs_pb2_grpc
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.programs.erasures.model import FIRST_POSITION, ErasureOutcome, StoreErasure
from pointbook_server.programs.erasures.transactions import StoreErasureTransactions
from pointbook_server.programs.messages import (
    ERASURE_OUTCOMES,
    read_erasure_request,
    read_program,
    read_store,
    write_erasure,
    write_program,
    write_store,
)
from pointbook_server.programs.model import program_not_found
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.rpc.pagination import read_page
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, PROGRAM_ID_MAX, Fields, read_etag, to_timestamp

log = structlog.get_logger()


class ProgramsServicer(programs_pb2_grpc.ProgramsServiceServicer):
    """ProgramsService: stores, programs, and the erasure of stores."""

    def __init__(self, programs: ProgramTransactions, erasures: StoreErasureTransactions, clock: Clock) -> None:
        self._programs = programs
        self._erasures = erasures
        self._clock = clock

    async def PutStore(self, request: programs_pb2.PutStoreRequest, _context: object) -> programs_pb2.PutStoreResponse:
        """Register or replace a store."""
        fields = Fields()
        fields.present("store", is_present=request.HasField("store"))
        store = read_store(fields, request.store)
        fields.check()
        may_register = current_principal.get().may_register_stores
        revision = await self._programs.put_store(
            store, read_etag(request.etag), self._clock(), may_register=may_register
        )
        return programs_pb2.PutStoreResponse(store=write_store(store), etag=str(revision))

    async def ReleaseStore(
        self, request: programs_pb2.ReleaseStoreRequest, _context: object
    ) -> programs_pb2.ReleaseStoreResponse:
        """Release a store of a merchant, and audit it."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.identifier("store_id", request.store_id)
        reason = fields.reason("reason", request.reason)
        fields.check()
        await self._programs.release_store(merchant_id, store_id)
        token_id = current_principal.get().token_id
        log.warning(
            "audit: store released", merchant_id=merchant_id, store_id=store_id, reason=reason, token_id=token_id
        )
        return programs_pb2.ReleaseStoreResponse()

    async def GetStore(self, request: programs_pb2.GetStoreRequest, _context: object) -> programs_pb2.GetStoreResponse:
        """Return a store."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("store_id", request.store_id)
        fields.check()
        store, revision = await self._programs.read_store(request.merchant_id, request.store_id)
        return programs_pb2.GetStoreResponse(store=write_store(store), etag=str(revision))

    async def ListStores(
        self, request: programs_pb2.ListStoresRequest, _context: object
    ) -> programs_pb2.ListStoresResponse:
        """Return a page of a merchant's stores."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        page = read_page(fields, request, ("stores", request.merchant_id), first=("",))
        fields.check()
        stores = await self._programs.list_stores(request.merchant_id, after=page.after[0], limit=page.limit)
        messages, next_page_token = page.build(stores, write_store, lambda store: (store.store_id,))
        return programs_pb2.ListStoresResponse(stores=messages, next_page_token=next_page_token)

    async def RequestStoreErasure(
        self, request: programs_pb2.RequestStoreErasureRequest, _context: object
    ) -> programs_pb2.RequestStoreErasureResponse:
        """Record a request to erase a store, and audit it if it is new."""
        fields = Fields()
        erasure_request = read_erasure_request(fields, request, self._clock())
        fields.check()
        outcome, erasure = await self._erasures.request(erasure_request)
        if outcome is ErasureOutcome.REQUESTED:
            due = to_timestamp(erasure.due_at_ms).ToJsonString()
            _log_of(erasure).warning("audit: store erasure requested", due=due)
        return programs_pb2.RequestStoreErasureResponse(
            outcome=ERASURE_OUTCOMES[outcome], erasure=write_erasure(erasure)
        )

    async def ListStoreErasures(
        self, request: programs_pb2.ListStoreErasuresRequest, _context: object
    ) -> programs_pb2.ListStoreErasuresResponse:
        """Return a page of the requests to erase stores: those of a merchant, or all."""
        fields = Fields()
        merchant_id = fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX)
        page = read_page(fields, request, ("store erasures", merchant_id), first=FIRST_POSITION)
        fields.check()
        erasures = await self._erasures.list_erasures(merchant_id, after=page.after, limit=page.limit)
        messages, next_page_token = page.build(erasures, write_erasure, lambda erasure: erasure.position)
        return programs_pb2.ListStoreErasuresResponse(erasures=messages, next_page_token=next_page_token)

    async def EraseStore(
        self, request: programs_pb2.EraseStoreRequest, _context: object
    ) -> programs_pb2.EraseStoreResponse:
        """Erase a part of the personal data of a store's customers, and audit it."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.identifier("store_id", request.store_id)
        reason = fields.reason("reason", request.reason)
        fields.check()
        progress = await self._erasures.erase(request.merchant_id, store_id, reason)
        _log_of(progress.erasure).warning(
            "audit: store erased", reason=reason, erased=progress.erased, remaining=progress.remaining
        )
        return programs_pb2.EraseStoreResponse(
            erased=progress.erased, remaining=progress.remaining, erasure=write_erasure(progress.erasure)
        )

    async def PutProgram(
        self, request: programs_pb2.PutProgramRequest, _context: object
    ) -> programs_pb2.PutProgramResponse:
        """Create or replace a program."""
        fields = Fields()
        fields.present("program", is_present=request.HasField("program"))
        program = read_program(fields, request.program)
        fields.check()
        revision = await self._programs.put_program(program, read_etag(request.etag), self._clock())
        return programs_pb2.PutProgramResponse(program=write_program(program), etag=str(revision))

    async def GetProgram(
        self, request: programs_pb2.GetProgramRequest, _context: object
    ) -> programs_pb2.GetProgramResponse:
        """Return a program."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.integer("program_id", request.program_id, low=1, high=PROGRAM_ID_MAX)
        fields.check()
        found = await self._programs.read_program(request.merchant_id, request.program_id)
        if found is None:
            raise program_not_found(request.program_id)
        program, revision = found
        return programs_pb2.GetProgramResponse(program=write_program(program), etag=str(revision))

    async def ListPrograms(
        self, request: programs_pb2.ListProgramsRequest, _context: object
    ) -> programs_pb2.ListProgramsResponse:
        """Return a page of a merchant's programs."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        page = read_page(fields, request, ("programs", request.merchant_id), first=(0,))
        fields.check()
        programs = await self._programs.list_programs(request.merchant_id, after=page.after[0], limit=page.limit)
        messages, next_page_token = page.build(programs, write_program, lambda program: (program.program_id,))
        return programs_pb2.ListProgramsResponse(programs=messages, next_page_token=next_page_token)


def _log_of(erasure: StoreErasure) -> Any:
    return log.bind(merchant_id=erasure.merchant_id, store_id=erasure.store_id)
