"""Random generators whose sequence can be repeated."""

import random


def printed_random() -> random.Random:
    """Return a generator after printing the state that creates it again.

    pytest shows the output of failed tests.
    """
    random_state = random.SystemRandom().randrange(2**32)
    print(f"random state {random_state}")  # noqa: T201 - for the report of a failed test
    return random.Random(random_state)  # noqa: S311 - not for secrets
