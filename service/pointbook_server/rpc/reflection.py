"""The standard reflection service, in both versions that clients use.

grpcio-reflection has v1alpha only. v1 is the same protocol under another name, so one servicer serves both, and the
messages of v1 are described by those of v1alpha.
Source: https://github.com/grpc/grpc-proto/blob/master/grpc/reflection/v1/reflection.proto
"""

from collections.abc import Iterable

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha import reflection, reflection_pb2

from pointbook_server.rpc.method_handlers import MethodHandlers

V1, V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"
SERVICE_NAMES = tuple(f"{package}.ServerReflection" for package in (V1, V1ALPHA))


def add_reflection(handlers: MethodHandlers, services: Iterable[str]) -> None:
    """Add reflection of some services, and of itself, to the handlers."""
    servicer = reflection.aio.ReflectionServicer((*services, *SERVICE_NAMES))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in SERVICE_NAMES:
        handlers.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})


def _describe_v1() -> None:
    """Add the description of v1 to the pool that reflection reads."""
    proto = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(proto)
    described = text_format.MessageToString(proto).replace(V1ALPHA, V1)
    v1 = text_format.Parse(described, FileDescriptorProto())
    v1.name = "grpc/reflection/v1/reflection.proto"
    Default().AddSerializedFile(v1.SerializeToString())


_describe_v1()
