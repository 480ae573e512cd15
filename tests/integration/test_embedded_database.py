"""The shared cluster of the tests: templates and their clones."""

import asyncio

from support.connections import fetch_value
from support.embedded_database import Cluster


async def test_clones_of_a_template_are_independent() -> None:
    prepared: list[str] = []

    async def prepare(url: str) -> None:
        prepared.append(url)
        await fetch_value(url, "CREATE TABLE numbers AS SELECT generate_series(1, 10) AS number")

    cluster = Cluster()
    await cluster.start()
    try:
        await asyncio.gather(*(cluster.template("ready", prepare) for _ in range(3)))
        assert prepared == [cluster.url("ready")]
        first, second = await asyncio.gather(cluster.clone("ready"), cluster.clone("ready"))
        await fetch_value(first, "DELETE FROM numbers")
        assert await fetch_value(first, "SELECT count(*) FROM numbers") == 0
        assert await fetch_value(second, "SELECT count(*) FROM numbers") == 10
    finally:
        await cluster.stop()
