"""What gRPC calls go through: interceptors, admission, field checks, pagination and batching."""
