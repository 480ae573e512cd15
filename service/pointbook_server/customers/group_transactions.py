"""Transactions of user groups.

All members are locked, so that no redemption reads a group while it changes.
"""

from dataclasses import replace

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import GroupKey, UserGroup, customer_not_found, group_not_found
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import FieldViolation, PointbookError, first_revision, next_revision
from pointbook_server.reasons import Reason


class UserGroupTransactions:
    """Writes user groups.

    Every change increments the revision, which is the etag. The first revision is random, so that the etag of a deleted
    group does not match a new one with the same id.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, group: UserGroup, expected_revision: int | None, now_ms: int) -> UserGroup:
        """Create or replace a group, and return it with its revision.

        Raises CUSTOMER_NOT_FOUND for a member, STALE_ETAG, IDENTIFIER_TAKEN if another group has the external id or
        primary member, and INVALID_FIELDS if the primary member would change.
        """

        async def work(connection: Connection) -> UserGroup:
            customers = CustomerRepository(connection, group.merchant_id)
            stored = await _lock_and_read(customers, group)
            revision = next_revision(0 if stored is None else stored.revision, expected_revision)
            if stored is not None and stored.primary_customer_id != group.primary_customer_id:
                raise _primary_changed()
            if stored is None:
                revision = first_revision()
            await customers.check_group_conflicts(group)
            if stored is not None:
                await customers.delete_group(group.group_id)
            await customers.insert_group(replace(group, revision=revision), now_ms)
            return replace(group, revision=revision)

        return await self._database.transaction(work)

    async def delete(self, merchant_id: str, group_id: str, expected_revision: int | None) -> None:
        """Delete a group. Raises GROUP_NOT_FOUND and STALE_ETAG."""

        async def work(connection: Connection) -> None:
            customers = CustomerRepository(connection, merchant_id)
            stored = await _lock_and_read(customers, UserGroup(merchant_id, group_id, "", "", ()))
            if stored is None:
                raise group_not_found(group_id)
            next_revision(stored.revision, expected_revision)
            await customers.delete_group(group_id)

        await self._database.transaction(work)


async def _lock_and_read(customers: CustomerRepository, group: UserGroup) -> UserGroup | None:
    """Lock the new and the old members of a group, and return the stored group.

    Raises CUSTOMER_NOT_FOUND for a new member.
    """
    before = await customers.find_group(GroupKey.ID, group.group_id)
    members = [member.customer_id for member in group.members]
    leaving = [member.customer_id for member in before.members] if before else []
    locked = await customers.lock([*members, *leaving])
    for index, customer_id in enumerate(members):
        if customer_id not in locked:
            raise customer_not_found(f"user_group.members[{index}].customer_id")
    stored = await customers.find_group(GroupKey.ID, group.group_id)
    if stored is not None and not locked.issuperset(member.customer_id for member in stored.members):
        raise RetryTransactionError  # Another call added members before the locks.
    return stored


def _primary_changed() -> PointbookError:
    violation = FieldViolation("user_group.primary_customer_id", "must be the primary member, who never changes")
    return PointbookError(Reason.INVALID_FIELDS, f"Wrong fields: {violation.field}.", violations=(violation,))
