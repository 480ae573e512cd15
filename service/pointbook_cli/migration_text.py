"""What `pointbook migrate --check` prints."""

from collections.abc import Sequence

from pointbook_cli.terminal import count_of
from pointbook_server.db.migrations.revisions import (
    Fit,
    Revision,
    StoredRevision,
    breaks_running_release,
    find_problem,
    fit,
    pending_revisions,
)


def describe_pending(stored: StoredRevision, revisions: Sequence[Revision]) -> tuple[bool, list[str]]:
    """Return whether migrations are pending, and the lines that name them.

    Raises OSError if a later release has taken away what this one needs.
    """
    found = fit(stored, revisions)
    if found is Fit.INCOMPATIBLE:
        raise OSError(find_problem(stored, revisions))
    if found is Fit.NEWER:
        return False, [f"The database is at revision {stored.number} of a later release, which this one can use."]
    pending = pending_revisions(stored, revisions)
    if not pending:
        return False, [f"The database is at revision {stored.number}; no migrations are pending."]
    number = count_of(len(pending), "migration is", "migrations are")
    lines = [f"The database is at revision {stored.number or 'nothing'}; {number} pending:"]
    for revision in pending:
        warning = " (needs --offline)" if breaks_running_release(revision, stored, revisions) else ""
        lines.append(f"{revision.number} {revision.phase}: {revision.title.rstrip('.')}{warning}")
    return True, lines
