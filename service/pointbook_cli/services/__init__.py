"""The services as processes: for development, as a server, or as workers."""
