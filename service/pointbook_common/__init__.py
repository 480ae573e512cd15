"""What the server, the shim and the command share."""
