"""Findings of `pointbook doctor` about settings, keys, TLS and tokens, and output."""

import json
import re
from base64 import b64encode
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from pointbook_cli.doctor import output, records
from pointbook_cli.doctor.findings import Finding, Level, Page, ok, problem, some_of, unchecked, warning
from pointbook_cli.doctor.settings import check_keys, check_settings, load_valid
from pointbook_cli.doctor.tls import check_tls
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import Token
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings
from support.certificates import Authority, Issued
from support.clocks import NOW_MS
from support.docs_pages import ROOT

AUTHORITY = Authority()
RANDOM_KEY = bytes(range(100, 132))
OTHER_KEY = bytes(range(150, 182))
NEW = NOW_MS - DAY_MS


def texts(findings: Iterable[Finding]) -> dict[str, Level]:
    """Return the levels of findings by their texts."""
    return {finding.text: finding.level for finding in findings}


def encoded(key: bytes) -> SecretStr:
    """Return a key as settings have it."""
    return SecretStr(b64encode(key).decode())


def key_texts(code_keys: dict[str, bytes], quarantine_keys: dict[str, bytes]) -> dict[str, Level]:
    """Return the findings about keys."""
    settings = ServerSettings(
        code_keys={key_id: encoded(key) for key_id, key in code_keys.items()},
        quarantine_keys={key_id: encoded(key) for key_id, key in quarantine_keys.items()},
    )
    return texts(check_keys(settings))


def test_all_problems_of_settings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "POINTBOOK_WORKERS": "0",
        "POINTBOOK_DATABASE_POOL_SISE": "5",
        "POINTBOOK_SHIM_WORKERS": "many",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = list(check_settings(environment))

    assert {finding.level for finding in found} == {Level.PROBLEM}
    assert [finding.text.partition(":")[0] for finding in found] == [
        "POINTBOOK_DATABASE_URL", "POINTBOOK_SHIM_WORKERS", "POINTBOOK_WORKERS", "POINTBOOK_DATABASE_POOL_SISE",
    ]  # fmt: skip
    assert "did you mean POINTBOOK_DATABASE_POOL_SIZE?" in found[-1].text


def test_a_shim_alone_needs_no_database() -> None:
    shim = {"POINTBOOK_SHOPLINE_SECRETS": "secret-of-the-app"}

    assert [finding.level for finding in check_settings(shim)] == [Level.OK]
    for server in ("POINTBOOK_CODE_KEYS", "pointbook_quarantine_keys_file"):
        assert [finding.level for finding in check_settings(shim | {server: "set"})] == [Level.PROBLEM]


def test_invalid_settings_are_replaced_by_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_WORKERS", "0")
    monkeypatch.setenv("POINTBOOK_DATABASE_POOL_SIZE", "7")
    settings = load_valid(ServerSettings)

    assert settings is not None
    assert (settings.workers, settings.database_pool_size) == (1, 7)


def test_random_and_different_keys_are_good() -> None:
    assert key_texts({"c1": RANDOM_KEY}, {"q1": OTHER_KEY}) == {"1 for codes, 1 for the quarantine": Level.OK}


def test_missing_keys_are_warnings() -> None:
    assert set(key_texts({}, {}).values()) == {Level.WARNING}
    assert len(key_texts({}, {"q1": OTHER_KEY})) == 1


@pytest.mark.parametrize("key", [b"k" * 32, b"correct-horse-battery-staple-123", bytes(8) + RANDOM_KEY[:8] * 3])
def test_keys_that_are_not_random_are_problems(key: bytes) -> None:
    found = key_texts({"c1": key}, {"q1": OTHER_KEY})

    assert found == {"POINTBOOK_CODE_KEYS: the key c1 is not random": Level.PROBLEM}


def test_a_key_for_two_purposes_is_a_problem() -> None:
    found = key_texts({"c1": RANDOM_KEY, "c2": RANDOM_KEY}, {"q1": RANDOM_KEY})

    same = "is the same as POINTBOOK_CODE_KEYS: the key c1"
    assert found == {
        f"POINTBOOK_CODE_KEYS: the key c2 {same}": Level.PROBLEM,
        f"POINTBOOK_QUARANTINE_KEYS: the key q1 {same}": Level.PROBLEM,
    }


def tls_texts(folder: Path, issued: Issued, *, with_ca: bool = False) -> dict[str, Level]:
    """Return the findings about a server's certificate."""
    cert, key = issued.write(folder, "server")
    (folder / "ca.crt").write_bytes(AUTHORITY.pem)
    ca = folder / "ca.crt" if with_ca else None
    settings = ServerSettings(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=ca)
    return texts(check_tls(settings, None))


def test_plaintext_is_good_only_if_no_setting_is_wrong() -> None:
    assert [finding.level for finding in check_tls(ServerSettings(), None)] == [Level.OK]
    assert [finding.level for finding in check_tls(ServerSettings(), None, is_valid=False)] == [Level.UNCHECKED]


def test_a_valid_certificate_is_good(tmp_path: Path) -> None:
    found = tls_texts(tmp_path, AUTHORITY.issue(life=timedelta(days=90, hours=1)))

    assert found == {"server: certificate valid for 90 days": Level.OK}


def test_every_certificate_of_a_chain_is_checked(tmp_path: Path) -> None:
    issued = AUTHORITY.issue()
    found = tls_texts(tmp_path, Issued(issued.chain + AUTHORITY.pem, issued.key))

    text = "server: POINTBOOK_TLS_CERT_FILE: certificate 2 of the chain expires in 0 days"
    assert found == {text: Level.WARNING}


@pytest.mark.parametrize(
    ("life", "text", "level"),
    [
        (timedelta(days=13, hours=1), "expires in 13 days", Level.WARNING),
        (timedelta(hours=-1), "expired 0 days ago", Level.PROBLEM),
    ],
)
def test_a_certificate_that_expires_is_found(tmp_path: Path, life: timedelta, text: str, level: Level) -> None:
    found = tls_texts(tmp_path, AUTHORITY.issue(life=life))

    assert found == {f"server: POINTBOOK_TLS_CERT_FILE {text}": level}


def test_a_chain_out_of_order_is_a_problem(tmp_path: Path) -> None:
    issued = AUTHORITY.issue()
    found = tls_texts(tmp_path, Issued(issued.chain + AUTHORITY.issue("stranger").chain, issued.key))

    text = "server: POINTBOOK_TLS_CERT_FILE: the chain is incomplete or out of order"
    assert found == {text: Level.PROBLEM}


def test_a_foreign_key_is_a_problem(tmp_path: Path) -> None:
    found = tls_texts(tmp_path, Issued(AUTHORITY.issue().chain, AUTHORITY.issue().key))

    text = "server: POINTBOOK_TLS_KEY_FILE: the key does not belong to POINTBOOK_TLS_CERT_FILE"
    assert found == {text: Level.PROBLEM}


def test_an_expiring_client_ca_is_found(tmp_path: Path) -> None:
    found = tls_texts(tmp_path, AUTHORITY.issue(), with_ca=True)

    assert found == {"server: POINTBOOK_TLS_CLIENT_CA_FILE expires in 0 days": Level.WARNING}


def test_a_key_that_everyone_can_read_is_a_warning(tmp_path: Path) -> None:
    issued = AUTHORITY.issue()
    issued.write(tmp_path, "server")[1].chmod(0o644)
    settings = ServerSettings(tls_cert_file=tmp_path / "server.crt", tls_key_file=tmp_path / "server.key")

    (finding,) = check_tls(settings, None)
    assert finding.level is Level.WARNING
    assert "POINTBOOK_TLS_KEY_FILE is readable by every user" in finding.text


def test_certificates_of_shim_clients_and_database_are_checked(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    cert, key = AUTHORITY.issue(life=timedelta(hours=-1)).write(tmp_path, "shim")
    url = f"postgresql://db.example/name?sslmode=verify-full&sslrootcert={tmp_path}/ca.crt&sslcert={cert}&sslkey={key}"
    shim = ShimSettings(
        http_tls_cert_file=cert,
        http_tls_key_file=key,
        server_ca_file=tmp_path / "ca.crt",
        client_cert_file=cert,
        client_key_file=key,
    )
    found = texts(check_tls(ServerSettings(database_url=SecretStr(url)), shim))

    assert found == {
        "shim: POINTBOOK_HTTP_TLS_CERT_FILE expired 0 days ago": Level.PROBLEM,
        "client: POINTBOOK_CLIENT_CERT_FILE expired 0 days ago": Level.PROBLEM,
        "client: POINTBOOK_SERVER_CA_FILE expires in 0 days": Level.WARNING,
        "database: POINTBOOK_DATABASE_URL (sslrootcert) expires in 0 days": Level.WARNING,
        "database client: POINTBOOK_DATABASE_URL (sslcert) expired 0 days ago": Level.PROBLEM,
    }


def token(number: int, **changes: Any) -> Token:
    """Return a token that is new and does not expire."""
    return Token(f"token-{number}", b"", "A person", ("*",), ("admin",), **{"created_at_ms": NEW, **changes})


def token_texts(*tokens: Token) -> dict[str, Level]:
    """Return the findings about tokens."""
    return texts(records.token_findings(tokens, NOW_MS))


def test_tokens_in_order_are_good() -> None:
    later = NOW_MS + 20 * DAY_MS
    assert token_texts(token(1), token(2, expires_at_ms=later)) == {"2 valid": Level.OK}


def test_tokens_that_expire_or_are_not_used_are_found() -> None:
    old = NOW_MS - 31 * DAY_MS
    found = token_texts(
        token(1, expires_at_ms=NOW_MS + DAY_MS),
        token(2, expires_at_ms=NOW_MS - 1, last_used_at_ms=NOW_MS - DAY_MS),
        token(3, expires_at_ms=NOW_MS - 1),
        token(4, created_at_ms=old),
        token(5, created_at_ms=old, last_used_at_ms=old),
    )

    assert found == {
        "1 token in use until this week expired: token-2": Level.PROBLEM,
        "1 token expires within 14 days: token-1": Level.WARNING,
        "1 token was never used in 30 days: token-4": Level.WARNING,
    }


def test_an_expired_token_with_a_successor_is_no_problem() -> None:
    used: dict[str, Any] = {"expires_at_ms": NOW_MS - 1, "last_used_at_ms": NOW_MS - DAY_MS}

    assert list(token_texts(token(1), token(2, **used)).values()) == [Level.PROBLEM]
    assert list(token_texts(token(1), token(2, **used, rotated_to="token-1")).values()) == [Level.OK]


def test_a_rotated_token_is_found_only_while_it_is_in_use() -> None:
    rotated: dict[str, Any] = {"expires_at_ms": NOW_MS + DAY_MS, "rotated_to": "token-9"}
    used, unused = token(1, **rotated, last_used_at_ms=NOW_MS - 1), token(2, **rotated)

    assert token_texts(used, unused, token(9)) == {"1 token expires within 14 days: token-1": Level.WARNING}


def test_no_valid_token_is_a_warning() -> None:
    assert token_texts() == {"no token is valid: a server that requires tokens refuses every call": Level.WARNING}


FINDINGS = [
    ok("tls", "plaintext"),
    warning("keys", "a key is missing", "set it", Page.CODE_KEYS),
    problem("database", "it is\x1b[2J away", "start it", Page.HEALTH),
    unchecked("clock", "no database"),
]


def test_findings_are_readable_without_colors(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_findings(FINDINGS)

    assert capsys.readouterr().out == (
        "✓  tls       plaintext\n"
        "!  keys      a key is missing\n"
        "             set it; see docs/operations.md#rotating-keys\n"
        "✗  database  it is\\x1b[2J away\n"
        "             start it; see docs/operations.md#health\n"
        "-  clock     not checked: no database\n"
        "\n"
        "1 problem, 1 warning.\n"
    )


def test_findings_are_one_json_document() -> None:
    document = json.loads(output.to_json(FINDINGS))

    assert (document["problems"], document["warnings"]) == (1, 1)
    assert document["findings"][1] == {
        "check": "keys",
        "level": "WARNING",
        "text": "a key is missing",
        "remedy": "set it",
        "page": "docs/operations.md#rotating-keys",
    }


@pytest.mark.parametrize(("count", "is_strict", "code"), [(2, False, 0), (2, True, 1), (3, False, 1), (1, True, 0)])
def test_exit_code_is_1_for_problems_and_if_strict_for_warnings(count: int, is_strict: bool, code: int) -> None:  # noqa: FBT001 - a case
    assert output.exit_code(FINDINGS[:count], is_strict=is_strict) == code


def test_pages_and_their_sections_exist() -> None:
    def anchors(path: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    missing = [page for page in Page for path, _, anchor in [page.partition("#")] if anchor not in anchors(path)]
    assert missing == []


def test_only_the_first_items_are_named() -> None:
    assert some_of(["a", "b"]) == "a, b"
    assert some_of([str(number) for number in range(1_008)]) == "0, 1, 2, 3, 4 and 1,003 more"
