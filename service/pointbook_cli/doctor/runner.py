"""Runs all checks, those that wait for others at the same time."""

import asyncio
from collections.abc import Mapping

from pointbook_cli.doctor.database import check_database
from pointbook_cli.doctor.findings import Finding, Level, unchecked
from pointbook_cli.doctor.processes import check_server, check_shim
from pointbook_cli.doctor.settings import check_keys, check_settings, is_shim_alone, load_valid
from pointbook_cli.doctor.tls import check_tls
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings


async def run_checks(environment: Mapping[str, str], silent_hours: float) -> list[Finding]:
    """Return the findings of all checks, in the order of the report.

    A store is silent after so many hours without a webhook.
    """
    server, shim = load_valid(ServerSettings), load_valid(ShimSettings)
    database, server_finding, shim_finding = await asyncio.gather(
        check_database(server, silent_hours), asyncio.to_thread(check_server), asyncio.to_thread(check_shim)
    )
    settings = list(check_settings(environment))
    is_valid = all(finding.level is Level.OK for finding in settings)
    keys = [unchecked("keys", "no server is set up here")] if is_shim_alone(environment) else check_keys(server)
    tls = check_tls(server, shim, is_valid=is_valid)
    return [*settings, *keys, *tls, *database, server_finding, shim_finding]
