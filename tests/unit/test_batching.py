"""The line in which items wait for their batch, with a fake of what sends them."""

import asyncio
from collections.abc import Sequence

from pointbook_server.batching import Line
from pointbook_server.errors import PointbookError, Reason

AWAY = PointbookError(Reason.DATABASE_UNAVAILABLE, "away")


async def test_nothing_of_a_call_is_sent_behind_a_batch_that_failed() -> None:
    """An item is judged by those before it: sent without them, it would get an answer for good that is wrong."""
    sent: list[list[int]] = []

    async def send(_key: str, items: Sequence[int]) -> list[int]:
        sent.append(list(items))
        if items[0] == 1:
            raise AWAY
        return list(items)

    line: Line[str, int, int] = Line(send, batch_max=2, waiting_max=7, lanes=1)
    answers = [*line.put("a", [1, 2, 3, 4, 5]), *line.put("a", [6]), *line.put("b", [7])]
    answered = await asyncio.gather(*answers)

    assert answered == [AWAY] * 5 + [6, 7]
    assert sent == [[1, 2], [7], [6]]
    line.admit(7)
