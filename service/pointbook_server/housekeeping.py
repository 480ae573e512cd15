"""Housekeeping that several servers do at once: merchant by merchant, a bounded part at a time."""

from collections.abc import Awaitable, Callable, Iterable


async def merchant_by_merchant(
    find: Callable[[], Awaitable[Iterable[str]]], work: Callable[[str], Awaitable[int]]
) -> int:
    """Do what there is to do for the merchants that are found, until no more is done; tells how much that was.

    `find` names some merchants without locking anything. `work` does a part for one of them, leaves out what others
    work on, which is left for the next time, and tells how much it did.
    """
    count, before = 0, -1
    while count > before:
        before = count
        for merchant_id in await find():
            while done := await work(merchant_id):
                count += done
    return count
