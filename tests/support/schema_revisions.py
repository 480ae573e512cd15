"""Parts of the revisions of this release."""

from pointbook_server.db.migrations.revisions import Revision, all_revisions


def revisions_before(number: str) -> tuple[Revision, ...]:
    """Return the revisions before one, oldest first."""
    numbers = [revision.number for revision in all_revisions()]
    return all_revisions()[: numbers.index(number)]
