"""The gRPC server of Pointbook: one folder a capability, and what they share."""
