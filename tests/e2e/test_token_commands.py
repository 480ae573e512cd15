"""`pointbook token rotate` and `pointbook token list --json`."""

import json
from datetime import datetime, timedelta

import pytest

from support.processes import one_line, pointbook


async def test_a_token_is_rotated_and_listed_as_json(database_url: str) -> None:
    options = ("--name", "till-7", "--merchant", "m-1", "--scope", "redeem", "--scope", "codes", "--days", "30")
    clients = ("--client-name", "till-7.internal", "--client-name", "Till 7")
    old = (await pointbook("token", "create", *options, *clients, DATABASE_URL=database_url)).out.strip()
    old_id = old.split("_")[1]
    made = await pointbook("token", "rotate", old_id, "--overlap", "90m", DATABASE_URL=database_url)
    listed = await pointbook("token", "list", "--json", DATABASE_URL=database_url)

    new = made.out.strip()
    _, new_id, secret = new.split("_", 2)
    assert (made.exit_code, made.out, old_id in made.err, secret in made.err) == (0, f"{new}\n", True, False)
    assert secret not in listed.out
    tokens = {token["id"]: token for token in json.loads(listed.out)}
    assert set(tokens[old_id]) == set(tokens[new_id]) == {
        "id", "name", "merchants", "scopes", "client_names", "created", "expires", "revoked", "last_used", "rotated_to",
    }  # fmt: skip
    assert tokens[old_id]["rotated_to"] == new_id
    for token in (tokens[old_id], tokens[new_id]):
        assert (token["name"], token["merchants"], token["scopes"]) == ("till-7", ["m-1"], ["codes", "redeem"])
        assert token["client_names"] == ["Till 7", "till-7.internal"]
        assert (token["revoked"], token["last_used"]) == (None, None)
    times = [tokens[old_id]["expires"], tokens[new_id]["created"], tokens[new_id]["expires"]]
    expires, created, later = map(datetime.fromisoformat, times)
    assert (expires - created, later - created) == (timedelta(minutes=90), timedelta(days=30))
    again = one_line(await pointbook("token", "rotate", old_id, DATABASE_URL=database_url))
    assert new_id in again


@pytest.mark.parametrize("overlap", ["24", "-1h", "1.5h", "h", "99999999d", "1w", ""])
async def test_an_invalid_overlap_is_reported_in_one_line(database_url: str, overlap: str) -> None:
    line = one_line(await pointbook("token", "rotate", "x", f"--overlap={overlap}", DATABASE_URL=database_url))
    assert "--overlap" in line
