"""The gRPC face of access."""

from pointbook.v1 import access_pb2, access_pb2_grpc
from pointbook_server.access.model import current_principal


class AccessServicer(access_pb2_grpc.AccessServiceServicer):
    """AccessService: what the token of each call permits."""

    async def GetCallerAccess(
        self, _request: access_pb2.GetCallerAccessRequest, _context: object
    ) -> access_pb2.GetCallerAccessResponse:
        """Return the caller's token id, merchants and scopes."""
        caller = current_principal.get()
        return access_pb2.GetCallerAccessResponse(
            token_id=caller.token_id, merchant_ids=sorted(caller.merchants), scopes=sorted(caller.scopes)
        )
