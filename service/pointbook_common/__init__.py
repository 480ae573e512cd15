"""What the server, the shim and the command share: text, secrets, certificates and file limits."""
