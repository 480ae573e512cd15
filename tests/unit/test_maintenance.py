"""Maintenance goes on until nothing more is done, and never spins on what others hold."""

from collections import Counter

from pointbook_server.maintenance import merchant_by_merchant


async def test_work_continues_until_no_merchant_is_left() -> None:
    """Two are found at a time, and each has its work done in parts; what somebody holds is left."""
    left = Counter({"a": 250, "b": 100, "c": 1, "held": 7, "d": 30})

    async def find() -> list[str]:
        return ["held", *[name for name in left if left[name] and name != "held"][:2]]

    async def work(merchant_id: str) -> int:
        done = 0 if merchant_id == "held" else min(left[merchant_id], 100)
        left[merchant_id] -= done
        return done

    assert await merchant_by_merchant(find, work) == 381
    assert left == {"a": 0, "b": 0, "c": 0, "held": 7, "d": 0}
