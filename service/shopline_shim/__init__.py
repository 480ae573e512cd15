"""The HTTP shim: translates SHOPLINE's webhooks into gRPC calls."""
