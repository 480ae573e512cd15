"""The rules of migrations, on bad examples and on the real ones."""

from collections.abc import Callable

import pytest

from pointbook_server.db.migrations.operations import backfill, create_index, drop_index
from pointbook_server.db.migrations.revisions import Revision, all_revisions
from support.migration_rules import find_broken_promises, find_problems, recorded_statements
from support.previous_release import REVISION
from support.revisions import upgrade_of

FIRST_CHECKED = "0028"
"""Earlier migrations were written before the rules."""
CHECKED = [revision for revision in all_revisions() if revision.number >= FIRST_CHECKED]
ADD_CHECK = "ALTER TABLE stores ADD CONSTRAINT ck_stores_note CHECK (note IS NOT NULL) NOT VALID"
VALIDATE = "ALTER TABLE stores VALIDATE CONSTRAINT ck_stores_note"
UNMARKED = "but is not marked as contracting the schema by compatible_from"
SET_NOT_NULL = "ALTER TABLE stores ALTER COLUMN note SET NOT NULL"


def revision(*steps: str | Callable[[], None], contracts: bool = False, in_transaction: bool = True) -> Revision:
    """Return a migration of SQL statements and other steps."""
    return Revision("0001", "Example.", upgrade_of(*steps), "0000" if contracts else None, in_transaction)


def problems_of(*revisions: Revision) -> list[str]:
    """Return the problems of migrations without their numbers."""
    return [problem.removeprefix("0001: ") for problem in find_problems(revisions)]


def test_migrations_can_run_beside_servers() -> None:
    assert CHECKED
    assert find_problems(CHECKED) == []


def test_migrations_have_ascending_numbers_of_four_digits() -> None:
    numbers = [each.number for each in all_revisions()]

    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]


def test_contracted_schemas_can_be_used_by_the_previous_release() -> None:
    assert find_broken_promises(all_revisions(), REVISION) == []


def test_broken_promise_to_the_previous_release_is_found() -> None:
    def contracting(number: str, compatible_from: str) -> Revision:
        return Revision(number, "Example.", lambda: None, compatible_from)

    assert find_broken_promises([contracting("0003", "0001"), contracting("0004", "0002")], "0002") == []
    assert find_broken_promises([contracting("0003", "0002"), contracting("0005", "0001")], "0002") == [
        "0005: an earlier migration took away more"
    ]
    assert find_broken_promises([contracting("0004", "0003")], "0002") == [
        "0004: the previous release, 0002, cannot use the schema"
    ]


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("CREATE INDEX i ON stores (note)", "blocks writes of stores while it builds i"),
        (
            "CREATE INDEX CONCURRENTLY i ON stores (note)",
            "builds i concurrently in a transaction: set in_transaction to False",
        ),
        ("UPDATE stores SET note = ''", "changes rows of stores in one transaction: use backfill"),
        ("DELETE FROM stores", "changes rows of stores in one transaction: use backfill"),
        ("LOCK TABLE stores", "runs a LockStmt, which is not known to be safe"),
        ("TRUNCATE stores", "runs a TruncateStmt, which is not known to be safe"),
        ("REINDEX TABLE stores", "runs a ReindexStmt, which is not known to be safe"),
        ("SET lock_timeout = 0", "runs a VariableSetStmt, which is not known to be safe"),
        (
            "ALTER TABLE stores ADD COLUMN n text DEFAULT now()",
            "rewrites stores: the default of n is no constant",
        ),
        (
            "ALTER TABLE stores ADD COLUMN note text NOT NULL",
            "requires stores.note, which servers of the previous release leave out",
        ),
        ("ALTER TABLE stores ADD COLUMN n bigserial", "rewrites or reads stores for n: bigserial"),
        (
            "ALTER TABLE stores ADD COLUMN n bigint GENERATED ALWAYS AS IDENTITY",
            "rewrites or reads stores for n: ['CONSTR_IDENTITY']",
        ),
        ("ALTER TABLE stores ADD COLUMN n text UNIQUE", "rewrites or reads stores for n: ['CONSTR_UNIQUE']"),
        (
            "ALTER TABLE stores ALTER COLUMN note TYPE jsonb USING note::jsonb",
            "alters stores by AlterColumnType, which is not known to be safe",
        ),
        ("ALTER TABLE stores SET UNLOGGED", "alters stores by SetUnLogged, which is not known to be safe"),
        (
            "ALTER TABLE stores ADD CONSTRAINT c CHECK (note <> '')",
            "reads all rows of stores under a lock: add c as NOT VALID",
        ),
        (
            "ALTER TABLE stores ADD CONSTRAINT c FOREIGN KEY (note) REFERENCES notes",
            "reads all rows of stores under a lock: add c as NOT VALID",
        ),
        (
            "ALTER TABLE stores ADD CONSTRAINT c UNIQUE (note)",
            "blocks stores while it builds the index of c: use one that was built before",
        ),
        (
            "ALTER TABLE stores DROP COLUMN note",
            f"drops stores.note, {UNMARKED}",
        ),
        (
            "DROP TABLE stores",
            f"drops an object (table), {UNMARKED}",
        ),
        ("DROP TYPE note", f"drops an object (type), {UNMARKED}"),
        (
            "ALTER TABLE stores RENAME COLUMN note TO remark",
            f"renames, {UNMARKED}",
        ),
        (
            "ALTER TABLE stores RENAME TO shops",
            f"renames, {UNMARKED}",
        ),
        ("ALTER TYPE note ADD ATTRIBUTE a text", "alters note, which is no table and not known to be safe"),
    ],
)
def test_rule_finds_the_bad_example(sql: str, problem: str) -> None:
    assert problems_of(revision(sql)) == [problem]


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE stores ADD COLUMN note text",
        "ALTER TABLE stores ADD COLUMN note text NOT NULL DEFAULT ''::text",
        "ALTER TABLE stores ALTER COLUMN note DROP NOT NULL",
        ADD_CHECK,
        VALIDATE,
        "CREATE TABLE notes (note text); CREATE INDEX i ON notes (note); ALTER TABLE notes ADD UNIQUE (note)",
        "ALTER TABLE stores ADD CONSTRAINT c UNIQUE USING INDEX i",
        "COMMENT ON COLUMN stores.note IS 'A note.'",
        "CREATE TYPE note AS (note text)",
    ],
)
def test_rules_accept_the_good_example(sql: str) -> None:
    assert problems_of(revision(sql)) == []


@pytest.mark.parametrize(
    "sql",
    ["ALTER TABLE stores DROP COLUMN note", "ALTER TABLE stores RENAME COLUMN note TO remark", "DROP TABLE stores"],
)
def test_migrations_that_contract_may_take_away(sql: str) -> None:
    assert problems_of(revision(sql, contracts=True)) == []


def test_column_is_required_after_an_earlier_migration_validated_it() -> None:
    add, validate, require = revision(ADD_CHECK), revision(VALIDATE), revision(SET_NOT_NULL, contracts=True)
    unvalidated = (
        "reads all rows of stores under a lock: an earlier migration validates a constraint CHECK (note IS NOT NULL)"
    )

    assert problems_of(add, validate, require) == []
    assert problems_of(add, require) == [unvalidated]
    assert problems_of(validate, require) == [unvalidated]
    assert problems_of(add, validate, revision(SET_NOT_NULL)) == [f"requires stores.note, {UNMARKED}"]


def test_constraint_is_validated_without_another_lock() -> None:
    problem = "reads all rows of stores under a lock: validate constraints in a migration of their own"

    assert problems_of(revision(ADD_CHECK, VALIDATE)) == [problem]


def test_one_migration_locks_one_table() -> None:
    statements = [f"ALTER TABLE {name} ADD COLUMN note text" for name in ("stores", "programs")]

    assert problems_of(revision(*statements)) == ["locks several tables: programs, stores"]
    statements[1] = "CREATE TRIGGER t BEFORE DELETE ON programs EXECUTE FUNCTION f()"
    assert problems_of(revision(*statements)) == ["locks several tables: programs, stores"]


def test_steps_that_commit_one_by_one_can_be_repeated() -> None:
    good = (
        lambda: create_index("i", "stores (note)", unique=True),
        lambda: backfill("stores", ["store_id"], {"note": "''"}, "note IS NULL"),
        VALIDATE,
    )
    bad = {
        "CREATE INDEX CONCURRENTLY i ON stores (note)": "IndexStmt",
        "ALTER TABLE stores ADD COLUMN note text": "AlterTableStmt",
        "CREATE TABLE notes (note text)": "CreateStmt",
    }

    assert problems_of(revision(*good, in_transaction=False)) == []
    for sql, kind in bad.items():
        problem = f"commits step by step, but cannot repeat a {kind}"
        assert problems_of(revision(sql, in_transaction=False)) == [problem]


def test_index_is_dropped_by_a_contracting_migration_without_blocking_reads() -> None:
    unmarked = f"drops an object (index), {UNMARKED}"
    dropping = lambda: drop_index("i")  # noqa: E731 - a step

    assert problems_of(revision(dropping, contracts=True, in_transaction=False)) == []
    assert problems_of(revision(dropping, in_transaction=False)) == [unmarked]
    assert problems_of(revision(dropping, contracts=True)) == [
        "runs a VariableSetStmt, which is not known to be safe",
        "drops an index concurrently in a transaction: set in_transaction to False",
    ]
    assert problems_of(revision("DROP INDEX i", contracts=True)) == ["blocks reads while it drops an index"]


def test_rules_would_have_found_earlier_migrations() -> None:
    """Statements of Python code are recorded, too."""
    earlier = [each for each in all_revisions() if each.number < FIRST_CHECKED]
    problems = find_problems(earlier)

    assert all(recorded_statements(each.upgrade) for each in earlier)
    assert "0022: blocks writes of validation_audit while it builds uq_validation_audit_repeated" in problems
    assert "0003: changes rows of points_accounts in one transaction: use backfill" in problems
