"""The error of the testing kit."""


class PointbookTestingError(Exception):
    """The server or the database of the tests cannot do what the test asks for.

    The message has the cause, and the end of the process's log if it has ended.
    """
