"""Maintenance of all merchants."""

from collections import Counter

from pointbook_server.maintenance import merchant_by_merchant


async def test_work_continues_until_nothing_more_can_be_done() -> None:
    """It ends although another process holds the rows of a merchant."""
    remaining = Counter({"a": 250, "b": 100, "c": 1, "locked": 7, "d": 30})

    async def find() -> list[str]:
        return ["locked", *[name for name in remaining if remaining[name] and name != "locked"][:2]]

    async def work(merchant_id: str) -> int:
        done = 0 if merchant_id == "locked" else min(remaining[merchant_id], 100)
        remaining[merchant_id] -= done
        return done

    assert await merchant_by_merchant(find, work) == 381
    assert remaining == {"a": 0, "b": 0, "c": 0, "locked": 7, "d": 0}
