"""Clients of a server's gRPC API."""

from collections.abc import Sequence
from typing import Any

import grpc

from pointbook.v1 import (
    access_pb2_grpc,
    benefits_pb2_grpc,
    customers_pb2,
    customers_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    programs_pb2,
    programs_pb2_grpc,
    redemption_pb2_grpc,
    webhooks_pb2_grpc,
)


class Client:
    """The stubs of all services over one channel, with a bearer token if there is one."""

    def __init__(
        self,
        port: int,
        token: str = "",
        options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        address, interceptors = f"127.0.0.1:{port}", [_Bearer(token)] if token else []
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=list(options), interceptors=interceptors)
        else:
            self.channel = grpc.aio.secure_channel(
                address, credentials, options=list(options), interceptors=interceptors
            )
        self.access = access_pb2_grpc.AccessServiceStub(self.channel)
        self.benefits = benefits_pb2_grpc.BenefitsServiceStub(self.channel)
        self.points = points_pb2_grpc.PointsServiceStub(self.channel)
        self.programs = programs_pb2_grpc.ProgramsServiceStub(self.channel)
        self.customers = customers_pb2_grpc.CustomersServiceStub(self.channel)
        self.redemption = redemption_pb2_grpc.RedemptionServiceStub(self.channel)
        self.webhooks = webhooks_pb2_grpc.WebhooksServiceStub(self.channel)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def put_store(self, merchant_id: str, store_id: str) -> None:
        """Register a store."""
        store = programs_pb2.Store(merchant_id=merchant_id, store_id=store_id)
        await self.programs.PutStore(programs_pb2.PutStoreRequest(store=store))

    async def put_program(self, merchant_id: str, store_id: str, **changes: Any) -> programs_pb2.Program:
        """Put program 1, which takes multiples of 10 points, at most 200 at a time.

        Source: docs/reference/capillary-isredeemable.md#criteria-example
        """
        program = programs_pb2.Program(
            **{
                "merchant_id": merchant_id,
                "program_id": 1,
                "store_ids": [store_id],
                "redemption_enabled": True,
                "criteria": {"multiples_of": 10, "max_points_per_redemption": 200},
                "point_value": "0.01",
                "currency_code": "USD",
                **changes,
            }
        )
        response = await self.programs.PutProgram(programs_pb2.PutProgramRequest(program=program))
        return response.program

    async def put_customer(self, merchant_id: str, customer_id: str, **changes: Any) -> customers_pb2.Customer:
        """Put a customer, and return them as stored."""
        customer = customers_pb2.Customer(merchant_id=merchant_id, customer_id=customer_id, **changes)
        return (await self.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=customer))).customer

    async def put_group(self, merchant_id: str, group_id: str, **changes: Any) -> customers_pb2.UserGroup:
        """Put a user group, and return it as stored."""
        group = customers_pb2.UserGroup(merchant_id=merchant_id, group_id=group_id, **changes)
        return (await self.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))).user_group

    async def customer(self, merchant_id: str, customer_id: str) -> customers_pb2.Customer:
        """Read a customer by their id."""
        request = customers_pb2.GetCustomerRequest(merchant_id=merchant_id, customer_id=customer_id)
        return (await self.customers.GetCustomer(request)).customer

    async def apply(self, update: points_pb2.PointsUpdate) -> points_pb2.ApplyPointsUpdateResponse:
        """Apply one points update."""
        return await self.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=update))

    async def account(self, merchant_id: str, store_id: str, buyer_id: str, **more: Any) -> points_pb2.PointsAccount:
        """Read an account."""
        request = points_pb2.GetPointsAccountRequest(
            merchant_id=merchant_id, store_id=store_id, buyer_id=buyer_id, **more
        )
        return (await self.points.GetPointsAccount(request)).account


class _Bearer(grpc.aio.UnaryUnaryClientInterceptor):
    """Puts a bearer token on every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()))
        metadata.add("authorization", f"Bearer {self._token}")
        return await continuation(client_call_details._replace(metadata=metadata), request)
