"""The details of redemptions: their reversals, and the points that are active now.

Any number of redemptions takes a fixed number of statements: reversals, programs, customers, groups and accounts. Only
an account whose row lacks the lots to compute its active points takes more.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pointbook_server.customers.model import key_of_ref
from pointbook_server.db.database import Connection
from pointbook_server.redemption import queries
from pointbook_server.redemption.allocation import SourceAccount
from pointbook_server.redemption.assessment import (
    GroupRef,
    RedemptionRequest,
    own_sources,
    redeemable_sources,
)
from pointbook_server.redemption.context_loader import AccountRepository, OpenCustomers, OpenLedger, Programs
from pointbook_server.redemption.model import IdempotencyContent, Redemption, RedemptionDetails, StoredReversal

REVERSALS_MAX = 100
"""The most reversals in the details of a redemption."""


class DetailsLoader:
    """A loader of the details of one merchant's redemptions."""

    def __init__(self, programs: Programs, open_customers: OpenCustomers, open_ledger: OpenLedger) -> None:
        self._programs = programs
        self._open_customers = open_customers
        self._open_ledger = open_ledger

    async def load(
        self, connection: Connection, merchant_id: str, redemptions: Sequence[Redemption], now_ms: int
    ) -> list[RedemptionDetails]:
        """Return the details of each redemption, in the same order."""
        if not redemptions:
            return []
        reversals = await _load_reversals(connection, merchant_id, redemptions)
        contents = {redemption.content for redemption in redemptions}
        active_points = await self._load_active_points(connection, merchant_id, contents, now_ms)
        return [
            RedemptionDetails(
                redemption=redemption,
                reversals=tuple(reversals[redemption.redemption_id][:REVERSALS_MAX]),
                has_more_reversals=len(reversals[redemption.redemption_id]) > REVERSALS_MAX,
                current_active_points=active_points[redemption.content],
            )
            for redemption in redemptions
        ]

    async def _load_active_points(
        self, connection: Connection, merchant_id: str, contents: Iterable[IdempotencyContent], now_ms: int
    ) -> dict[IdempotencyContent, int]:
        """Return the points that are active now for each content."""
        sources = await self.load_sources(connection, merchant_id, list(contents))
        return await sum_active_points(self._open_ledger(connection, merchant_id), sources, now_ms)

    async def load_sources(
        self, connection: Connection, merchant_id: str, contents: Sequence[IdempotencyContent]
    ) -> dict[IdempotencyContent, tuple[SourceAccount, ...]]:
        """Return the accounts that each content could draw on now."""
        programs = await self._programs.read(connection, merchant_id, {content.program_id for content in contents})
        crosses = any(content.group_redemption for content in contents)
        cross_programs = await self._programs.read_cross_program(connection, merchant_id) if crosses else []
        customers = self._open_customers(connection, merchant_id)
        keys = {content.redeemer: key_of_ref(content.redeemer) for content in contents}
        found = await customers.find_all(set(keys.values()))
        group_ids = {content.group_id for content in contents if content.group_id}
        groups = await customers.find_groups(group_ids) if group_ids else {}
        sources = {}
        for content in contents:
            program, key = programs.get(content.program_id), keys[content.redeemer]
            others = (
                cross_programs
                if content.group_redemption and program and program.allow_cross_program_redemption
                else []
            )
            drawable = () if program is None else (program, *others)
            own = own_sources(key, found.get(key))
            request = _to_request(merchant_id, content)
            sources[content] = redeemable_sources(request, drawable, own, groups.get(content.group_id))
        return sources


async def sum_active_points(
    ledger: AccountRepository, sources: Mapping[IdempotencyContent, Iterable[SourceAccount]], now_ms: int
) -> dict[IdempotencyContent, int]:
    """Return the points that are active in the accounts of each content.

    Accounts that the ledger has read before are not read again.
    """
    keys = {source.key for content_sources in sources.values() for source in content_sources}
    if unread := keys.difference(ledger.accounts):
        await ledger.read(unread)
    active = {
        key: (await ledger.load_lots(key, ledger.accounts[key], now_ms)).points_at(now_ms).active
        for key in keys.intersection(ledger.accounts)
    }
    return {
        content: sum(active.get(source.key, 0) for source in content_sources)
        for content, content_sources in sources.items()
    }


def _to_request(merchant_id: str, content: IdempotencyContent) -> RedemptionRequest:
    """Build the request that a redemption came from."""
    return RedemptionRequest(
        merchant_id=merchant_id,
        identifier="",
        key=key_of_ref(content.redeemer),
        program_id=content.program_id,
        points=content.points,
        currency_value=None,
        group_redemption=content.group_redemption,
        group=GroupRef() if content.group_id else None,
        channel=None,
    )


async def _load_reversals(
    connection: Connection, merchant_id: str, redemptions: Iterable[Redemption]
) -> dict[str, list[StoredReversal]]:
    """Return the newest reversals by redemption: one more than the details have."""
    redemption_ids = sorted({redemption.redemption_id for redemption in redemptions if redemption.reversed_points})
    reversals: defaultdict[str, list[StoredReversal]] = defaultdict(list)
    if not redemption_ids:
        return reversals
    params = {"merchant_id": merchant_id, "redemption_ids": redemption_ids, "limit": REVERSALS_MAX + 1}
    for reversal in map(queries.read_reversal, await connection.fetch(queries.READ_REVERSALS, params)):
        reversals[reversal.redemption_id].append(reversal)
    return reversals
