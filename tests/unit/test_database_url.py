"""The check of the database's URL: TLS with a verified name beyond loopback."""

import contextlib
import inspect
import ssl
from pathlib import Path

import asyncpg
import pytest
from asyncpg import connect_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from pointbook_server.db.database_url import FORM, check_database_url
from support.examples import examples

PIECES = [
    "localhost", "127.0.0.1", "[::1]", "::1", "db.example.com", "/run", "%2Frun", "%252Frun", "%256cocalhost",
    "%6cocalhost", "127.0.0.1%2Cdb", ",", "@", ":", "user:secret@", ":5432", "5432", "x", "", "%00", ";", "disable",
]  # fmt: skip
QUERY_NAMES = ["host", "h%6fst", "HOST", "hostaddr", "port", "sslmode", "SSLMODE", "user", "dbname"]
DRIVER_ARGUMENTS = dict.fromkeys(inspect.signature(connect_utils._parse_connect_dsn_and_args).parameters)
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
LOCAL = [
    "postgresql://localhost/pointbook",
    "postgresql://user:pass%40word@127.0.0.1:5432/pointbook",
    "postgresql://[::1]:5432/pointbook",
    "postgresql://127.0.0.1,[::1]:5433/pointbook",
    "postgresql://user@%2Fvar%2Frun/pointbook",
    "postgresql:///pointbook?host=/var/run/postgresql&port=5433",
    "postgresql:///pointbook",
]
REMOTE = [
    "postgresql://db/pointbook",
    "postgresql://user:secret@10.0.0.7:5432/pointbook",
    "postgresql://[2001:db8::7]/pointbook",
    "postgresql://127.0.0.1,db.example.com/pointbook",
    "postgresql:///pointbook?host=db.example.com",
    "postgresql:///pointbook?service=loyalty",
    "postgresql://user:se@cret@127.0.0.1/pointbook",
    "postgresql://localhost.example.com/pointbook",
    "postgresql:///pointbook?host=%256cocalhost",
    "postgresql:///pointbook?host=%252Fvar%252Frun",
]


@pytest.mark.parametrize("url", LOCAL)
def test_loopback_and_unix_sockets_need_no_tls(url: str) -> None:
    assert check_database_url(url, allow_plaintext=False, environment={}) == url


@pytest.mark.parametrize("mode", ["", "disable", "allow", "prefer", "require", "verify-ca"])
@pytest.mark.parametrize("url", REMOTE)
def test_other_machines_need_verified_tls(url: str, mode: str) -> None:
    """Weaker modes fall back to plaintext, or trust any server."""
    with_mode = f"{url}{'&' if '?' in url else '?'}sslmode={mode}" if mode else url

    with pytest.raises(ValueError, match=r"is beyond loopback: add \?sslmode=verify-full") as caught:
        check_database_url(with_mode, allow_plaintext=False, environment={})
    assert check_database_url(with_mode, allow_plaintext=True, environment={}) == with_mode
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", REMOTE)
def test_verified_tls_is_enough(url: str) -> None:
    """The last of several modes counts, as for the driver."""
    verified = f"{url}{'&' if '?' in url else '?'}sslmode=disable&sslmode=verify-full"

    assert check_database_url(verified, allow_plaintext=False, environment={}) == verified


@pytest.mark.parametrize(
    "variables", [{"PGHOST": "db.example.com"}, {"PGHOST": "%6cocalhost"}, {"PGSERVICE": "loyalty"}]
)
def test_hosts_from_the_environment_are_checked(variables: dict[str, str]) -> None:
    """The driver uses them if the URL names no host."""
    with pytest.raises(ValueError, match="is beyond loopback"):
        check_database_url("postgresql:///pointbook", allow_plaintext=False, environment=variables)
    assert check_database_url(LOCAL[0], allow_plaintext=False, environment=variables) == LOCAL[0]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mysql://localhost/pointbook",
        "postgresql://localhost:port/pointbook",
        "postgresql://localhost:99999/pointbook",
        "postgresql://localhost,127.0.0.1:99999/pointbook",
        "postgresql://localhost/pointbook?sslmode",
        "postgresql://[::1/pointbook",
        "postgresql://localhost,/pointbook",
        "postgresql://localhost/pointbook?port=5432,x",
    ],
)
def test_other_forms_are_refused(url: str) -> None:
    """The error quotes nothing of the URL, which may contain a password."""
    with pytest.raises(ValueError, match=FORM):
        check_database_url(url, allow_plaintext=True, environment={})


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_unreadable_tls_file_is_named(name: str, tmp_path: Path) -> None:
    """The driver would report it at each connection, like an unavailable database."""
    for path in (tmp_path / "missing.pem", tmp_path):
        url = f"postgresql://db/pointbook?sslmode=verify-full&{name}={path}"
        with pytest.raises(ValueError, match=f"names a file in {name} that cannot be read"):
            check_database_url(url, allow_plaintext=False, environment={})


@settings(max_examples=examples(500))
@given(
    netloc=st.builds("".join, st.lists(st.sampled_from(PIECES), max_size=4)),
    query=st.lists(st.tuples(st.sampled_from(QUERY_NAMES), st.sampled_from([*PIECES, "verify-full"])), max_size=3),
    environment=st.dictionaries(st.sampled_from(["PGHOST", "PGPORT", "PGSSLMODE"]), st.sampled_from(PIECES)),
)
def test_driver_interprets_a_url_as_the_check_does(
    netloc: str, query: list[tuple[str, str]], environment: dict[str, str]
) -> None:
    """Every URL that passes connects to this machine only, or verifies the server."""
    url = f"postgresql://{netloc}/pointbook?{'&'.join(map('='.join, query))}".removesuffix("?")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PGHOST", "PGPORT", "PGSSLMODE", "PGSERVICE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_arguments, **_options: None)
        try:
            checked = check_database_url(url, allow_plaintext=False)
        except ValueError:
            return
        # The driver itself reports other errors, such as more ports than hosts.
        with contextlib.suppress(asyncpg.ClientConfigurationError):
            arguments = {**DRIVER_ARGUMENTS, "dsn": checked}
            addresses, parameters = connect_utils._parse_connect_dsn_and_args(**arguments)
            is_local = all(isinstance(each, str) or each[0] in LOOPBACK for each in addresses)
            assert is_local or parameters.sslmode is connect_utils.SSLMode.verify_full
