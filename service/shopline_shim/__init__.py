"""The HTTP shim between SHOPLINE's webhooks and the gRPC server."""
