"""The revisions of the schema, and which releases can use each of them.

A release can use the schema of its own newest revision, and later ones that only expand it. A migration that takes
something away contracts the schema: it names the oldest revision whose release still works, and the database stores it
beside its own revision (`compatible_from` in alembic_version), since an earlier release cannot know later migrations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path

from alembic.script import Script, ScriptDirectory

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Revision:
    """One migration.

    `compatible_from` marks a migration that contracts the schema: releases whose newest revision is older cannot use
    the result. Without it, the migration expands the schema, and all releases can. `in_transaction` is False for
    migrations that commit step by step, such as an index that is built while writes continue.
    """

    number: str
    title: str
    upgrade: Callable[[], None]
    compatible_from: str | None = None
    in_transaction: bool = True

    @property
    def phase(self) -> str:
        """What the migration does to the schema: "expand" or "contract"."""
        return "contract" if self.compatible_from else "expand"


@dataclass(frozen=True, slots=True)
class StoredRevision:
    """What a database stores about its schema.

    That is its revision, and the oldest one whose release can use it. None stands for a database that was never
    migrated, and for a schema that was never contracted.
    """

    number: str | None
    compatible_from: str | None = None


class Fit(Enum):
    """How the schema of a database fits a release."""

    CURRENT = auto()
    OLDER = auto()
    NEWER = auto()
    """A later release expanded it; this release can use it."""
    INCOMPATIBLE = auto()
    """A later release contracted it; this release cannot use it."""


@cache
def all_revisions() -> tuple[Revision, ...]:
    """Return the revisions of this release, oldest first.

    Reading the scripts takes tens of milliseconds, and each check of the database's health needs them.
    """
    scripts = ScriptDirectory(str(FOLDER)).walk_revisions()
    return tuple(_revision(script) for script in reversed(list(scripts)))


def fit(stored: StoredRevision, revisions: Sequence[Revision]) -> Fit:
    """Return how a database fits the release with these revisions."""
    known = {revision.number for revision in revisions}
    if stored.number == revisions[-1].number:
        return Fit.CURRENT
    if stored.number is None or stored.number in known:
        return Fit.OLDER
    return Fit.NEWER if stored.compatible_from is None or stored.compatible_from in known else Fit.INCOMPATIBLE


def find_problem(stored: StoredRevision, revisions: Sequence[Revision]) -> str | None:
    """Return why the release with these revisions cannot use a database, or None.

    The cause is one line with the remedy.
    """
    newest, found = revisions[-1].number, fit(stored, revisions)
    if found is Fit.OLDER:
        return (
            f"the database has {f'revision {stored.number}' if stored.number else 'no revision'}, and this release "
            f"needs revision {newest}: run `pointbook migrate`"
        )
    if found is Fit.INCOMPATIBLE:
        return (
            f"a later release changed the database: it is at revision {stored.number}, which releases before revision "
            f"{stored.compatible_from} cannot use, and this one has {newest}: install a later release"
        )
    return None


def pending_revisions(stored: StoredRevision, revisions: Sequence[Revision]) -> tuple[Revision, ...]:
    """Return the revisions that a database lacks, oldest first; none if it is newer."""
    if fit(stored, revisions) is not Fit.OLDER:
        return ()
    return tuple(revisions[_position(stored.number, revisions) :])


def breaks_running_release(revision: Revision, stored: StoredRevision, revisions: Sequence[Revision]) -> bool:
    """Return whether a revision takes away what servers on a database may use.

    They are of the release that the database's revision belongs to, or earlier: later ones refuse it.
    """
    if stored.number is None or revision.compatible_from is None:
        return False
    return _position(revision.compatible_from, revisions) > _position(stored.number, revisions)


def _position(number: str | None, revisions: Sequence[Revision]) -> int:
    """Return how many revisions a database at one of them has."""
    return next((place for place, each in enumerate(revisions, 1) if each.number == number), 0)


def _revision(script: Script) -> Revision:
    module = script.module
    return Revision(
        number=script.revision,
        title=script.doc,
        upgrade=module.upgrade,
        compatible_from=getattr(module, "compatible_from", None),
        in_transaction=getattr(module, "in_transaction", True),
    )
