"""The transactions of user groups. All members are locked, so that nobody redeems from a group while it changes."""

from dataclasses import replace

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import GroupKey, UserGroup, customer_not_found
from pointbook_server.db.database import Connection, Database, RetryTransactionError
from pointbook_server.errors import FieldViolation, PointbookError, Reason, first_revision, next_revision


class UserGroupTransactions:
    """Writes user groups. A revision counts up with every change of a group, and is the etag.

    A new group begins anywhere, so that an etag of a deleted group is none of the one that takes its id.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, group: UserGroup, expected_revision: int | None, now_ms: int) -> UserGroup:
        """Create or replace a group, and answer it as it is kept.

        Raises CUSTOMER_NOT_FOUND for a member, STALE_ETAG, IDENTIFIER_TAKEN for what names another group already, and
        INVALID_FIELDS for another primary member than before.
        """

        async def work(connection: Connection) -> UserGroup:
            book = CustomerRepository(connection, group.merchant_id)
            kept = await _locked(book, group)
            revision = next_revision(0 if kept is None else kept.revision, expected_revision)
            if kept is not None and kept.primary_customer_id != group.primary_customer_id:
                raise _primary_changed()
            if kept is None:
                revision = first_revision()
            await book.check_rival_groups(group)
            if kept is not None:
                await book.delete_group(group.group_id)
            await book.create_group(replace(group, revision=revision), now_ms)
            return replace(group, revision=revision)

        return await self._database.transaction(work)

    async def delete(self, merchant_id: str, group_id: str, expected_revision: int | None) -> None:
        """Delete a group. Raises GROUP_NOT_FOUND and STALE_ETAG."""

        async def work(connection: Connection) -> None:
            book = CustomerRepository(connection, merchant_id)
            kept = await _locked(book, UserGroup(merchant_id, group_id, "", "", ()))
            if kept is None:
                raise group_not_found(group_id)
            next_revision(kept.revision, expected_revision)
            await book.delete_group(group_id)

        await self._database.transaction(work)


async def _locked(book: CustomerRepository, group: UserGroup) -> UserGroup | None:
    """Lock all whom a change of a group is about, those who leave it too, and read it as it is under the locks."""
    before = await book.group(GroupKey.ID, group.group_id)
    members = [member.customer_id for member in group.members]
    leaving = [member.customer_id for member in before.members] if before else []
    known = await book.lock([*members, *leaving])
    for index, customer_id in enumerate(members):
        if customer_id not in known:
            raise customer_not_found(f"user_group.members[{index}].customer_id")
    kept = await book.group(GroupKey.ID, group.group_id)
    if kept is not None and not known.issuperset(member.customer_id for member in kept.members):
        raise RetryTransactionError  # Another call gave it further members before the locks.
    return kept


def group_not_found(group_id: str) -> PointbookError:
    """Tell that the merchant has no such group."""
    return PointbookError(
        Reason.GROUP_NOT_FOUND, "The merchant has no such user group.", metadata={"group_id": group_id}
    )


def _primary_changed() -> PointbookError:
    violation = FieldViolation("user_group.primary_customer_id", "must be the primary member, who never changes")
    return PointbookError(Reason.INVALID_FIELDS, f"Wrong fields: {violation.field}.", violations=(violation,))
