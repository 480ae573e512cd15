"""The error of the embedded database."""


class EmbeddedPostgresError(Exception):
    """The embedded database cannot run.

    The message is one line with the cause and what to do.
    """
