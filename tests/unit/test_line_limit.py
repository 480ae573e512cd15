"""The limit on log lines of the same kind."""

import asyncio

from pointbook_common.line_limit import LineLimit
from support.waiting import until


async def test_the_first_lines_of_each_kind_are_admitted_and_others_counted() -> None:
    rest: dict[str, int] = {}
    limit = LineLimit({"few": 2, "many": 5}.__getitem__, rest.__setitem__)

    admitted = [limit.admits("few") for _ in range(4)] + [limit.admits("many") for _ in range(5)]

    assert admitted == [True, True, False, False] + [True] * 5
    await until(lambda: rest == {"few": 2})


async def test_a_new_second_begins_after_the_count() -> None:
    counted = asyncio.Event()
    limit: LineLimit[str] = LineLimit(lambda _kind: 1, lambda _kind, _count: counted.set())
    assert [limit.admits("call"), limit.admits("call")] == [True, False]

    await asyncio.wait_for(counted.wait(), 5)

    assert limit.admits("call")


async def test_without_an_allowance_lines_are_only_counted() -> None:
    rest: dict[str, int] = {}
    limit: LineLimit[str] = LineLimit(lambda _kind: 0, rest.__setitem__)

    assert not limit.admits("call")
    await until(lambda: rest == {"call": 1})
