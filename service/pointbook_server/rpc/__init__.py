"""What gRPC calls pass through: interceptors, admission, field checks, batching."""
