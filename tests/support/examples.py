"""The number of random examples: a share in `make test`, all in `make soak`."""

from hypothesis import settings

QUICK, FULL = "quick", "full"
EXAMPLES_MIN = 10
_FULL_EXAMPLES = 100

# The same examples in every run, so that a failure is due to a change.
settings.register_profile(QUICK, max_examples=30, deadline=None, derandomize=True)
settings.register_profile(FULL, max_examples=_FULL_EXAMPLES, deadline=None)


def examples(count: int) -> int:
    """Return the profile's share of `count` examples."""
    return min(count, max(EXAMPLES_MIN, count * settings().max_examples // _FULL_EXAMPLES))
