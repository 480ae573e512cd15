"""`pointbook doctor` next to a running server and shim."""

import base64
import json
import os
import re
import time
from datetime import timedelta
from pathlib import Path

from pointbook_client.testing.ports import free_port
from support.certificates import Authority
from support.database_proxy import proxied
from support.docs_pages import DOCS, blocks_of
from support.embedded_database import Cluster
from support.processes import Finished, pointbook, running

AUTHORITY = Authority()
SECRET = "app-secret-of-the-doctor"
NAMES = [
    "settings", "keys", "tls", "database", "schema", "clock", "tokens", "quarantine", "stores", "drift", "holds",
    "erasures", "server", "shim",
]  # fmt: skip


def new_key() -> str:
    """Return a random key of the settings."""
    return f"k1:{base64.b64encode(os.urandom(32)).decode()}"


def levels(finished: Finished) -> dict[str, str]:
    """Return the level of each check, the worst one of several findings."""
    found: dict[str, str] = {}
    for finding in json.loads(finished.out)["findings"]:
        found[finding["check"]] = max(finding["level"], found.get(finding["check"], ""), key=_BADNESS.index)
    return found


_BADNESS = ["", "OK", "UNCHECKED", "WARNING", "PROBLEM"]


async def create_token(database_url: str) -> str:
    """Create a token of a shim, as an operator does."""
    scopes = [option for scope in ("points.write", "webhooks", "telephony") for option in ("--scope", scope)]
    created = await pointbook(
        "token", "create", "--name", "shim", "--merchant", "*", *scopes, DATABASE_URL=database_url
    )
    return created.out.strip()


def stable(text: str) -> str:
    """Return a report without what differs between machines and runs."""
    text = re.sub(r"PostgreSQL \S+, \S+ ms", "PostgreSQL …", text)
    return re.sub(r"127\.0\.0\.1:\d+|revision \d+", "…", text)


async def test_all_is_well_while_server_and_shim_run_and_not_after(database_url: str, tmp_path: Path) -> None:
    token = await create_token(database_url)
    cert, key = AUTHORITY.issue("server").write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = {
        "DATABASE_URL": database_url,
        "GRPC_ADDRESS": f"127.0.0.1:{free_port()}",
        "HTTP_ADDRESS": f"127.0.0.1:{free_port()}",
        "CODE_KEYS": new_key(),
        "QUARANTINE_KEYS": new_key(),
        "TLS_CERT_FILE": str(cert),
        "TLS_KEY_FILE": str(key),
        "SERVER_CA_FILE": str(tmp_path / "ca.crt"),
        "SERVER_NAME": "localhost",
        "SHOPLINE_SECRETS": SECRET,
        "TOKEN": token,
    }
    async with (
        running("serve", folder=tmp_path, settings=settings) as server,
        running("shim", folder=tmp_path, settings=settings) as shim,
    ):
        await server.printed('"serving"')
        await shim.printed('"listening"')

        async def is_well() -> bool:
            return (await pointbook("doctor", **settings)).exit_code == 0

        await server.until(is_well)
        well = await pointbook("doctor", "--json", **settings)
    stopped = await pointbook("doctor", "--json", **settings)
    strict = await pointbook("doctor", "--strict", **settings)

    assert levels(well) == dict.fromkeys(NAMES, "OK") | {"tls": "WARNING"}
    assert levels(stopped) == levels(well) | {"server": "WARNING", "shim": "WARNING"}
    assert (well.exit_code, well.err, stopped.exit_code, strict.exit_code) == (0, "", 0, 1)
    secrets = (token, SECRET, settings["CODE_KEYS"].partition(":")[2], settings["QUARANTINE_KEYS"].partition(":")[2])
    assert [secret for secret in secrets if secret in well.out + stopped.out + strict.out] == []


async def test_nothing_is_wrong_where_a_shim_runs_without_a_server() -> None:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("GRPC_ADDRESS", "HTTP_ADDRESS")}
    finished = await pointbook("doctor", "--json", SHOPLINE_SECRETS=SECRET, **addresses)

    found = levels(finished)
    assert finished.exit_code == 0
    assert [name for name in NAMES if found[name] != "UNCHECKED"] == ["settings", "tls", "server", "shim"]


async def test_certificates_of_wrong_settings_are_not_checked() -> None:
    address = f"127.0.0.1:{free_port()}"
    finished = await pointbook("doctor", "--json", GRPC_ADDRESS=address, TLS_CERT_FILE="/nowhere")

    assert (finished.exit_code, levels(finished)["tls"]) == (1, "UNCHECKED")


async def test_the_page_shows_the_report_as_it_is(cluster: Cluster, database_url: str, tmp_path: Path) -> None:
    del database_url  # It makes the template.
    own_url = await cluster.clone("pointbook_template")
    await create_token(own_url)
    cert, key = AUTHORITY.issue("server", life=timedelta(days=9, hours=1)).write(tmp_path, "server")
    finished = await pointbook(
        "doctor",
        DATABASE_URL=own_url,
        GRPC_ADDRESS=f"127.0.0.1:{free_port()}",
        CODE_KEYS=new_key(),
        QUARANTINE_KEYS=new_key(),
        TLS_CERT_FILE=str(cert),
        TLS_KEY_FILE=str(key),
    )
    (shown,) = blocks_of((DOCS / "operator-commands.md").read_text(), "text")

    assert finished.exit_code == 0
    assert stable(finished.out) == stable(shown)


async def test_a_hanging_database_leaves_the_other_checks(database_url: str) -> None:
    async with proxied(database_url) as proxy:
        proxy.freeze()
        started = time.monotonic()
        finished = await pointbook(
            "doctor", "--json", DATABASE_URL=proxy.url, GRPC_ADDRESS=f"127.0.0.1:{free_port()}", WORKRS="2"
        )
        seconds = time.monotonic() - started

    found = levels(finished)
    assert finished.exit_code == 1
    assert list(found) == NAMES
    assert [name for name in NAMES if found[name] == "PROBLEM"] == ["settings", "database"]
    assert {found[name] for name in NAMES[4:12]} == {"UNCHECKED"}
    assert seconds < 30
