"""What gRPC calls pass through: handlers, admission, field checks, batching."""
