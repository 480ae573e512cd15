"""Conversion of times to milliseconds and protobuf timestamps. Pure."""

from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook_common.durations import SECOND_MS

TIMES_MS = range(253_402_300_800_000)
"""From 1970 to the end of the year 9999, the last one of a protobuf Timestamp."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def epoch_ms(time: datetime) -> int | None:
    """Return the milliseconds since 1970, or None for a time without an offset."""
    return None if time.tzinfo is None else (time - _EPOCH) // _MILLISECOND


def to_timestamp(time_ms: int) -> Timestamp:
    """Return a time of TIMES_MS as a protobuf Timestamp."""
    seconds, rest_ms = divmod(time_ms, SECOND_MS)
    return Timestamp(seconds=seconds, nanos=rest_ms * 1_000_000)
