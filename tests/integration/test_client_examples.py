"""The examples in the client's docstrings run, some against a real server."""

import asyncio
import doctest
import importlib
import pkgutil

import pytest

import pointbook_client
from pointbook_client import Buyer, CustomerRef, connect, sync
from support.doc_examples import find_examples, run_examples
from support.redemption import earn
from support.servers import Service
from support.shops import Shop

MODULES = [
    pointbook_client,
    *(
        importlib.import_module(f"pointbook_client.{found.name}")
        for found in pkgutil.iter_modules(pointbook_client.__path__)
    ),
]
EXAMPLES = [found for module in MODULES for found in find_examples(module)]
CALLS = {"connect", "redeem", "reverse", "list_redemptions", "pages", "with_options", "get_customer_points"}
"""The functions of both clients that must have examples."""


@pytest.fixture
async def customer(service: Service, shop: Shop) -> CustomerRef:
    """A customer with 100 points in program 1."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(service.client, shop, 100)
    return CustomerRef(shop.merchant_id, buyer=Buyer(shop.store_id, "buyer"))


@pytest.mark.parametrize("found", EXAMPLES, ids=lambda found: found.name)
async def test_examples_of_docstrings_run(
    service: Service, admin_token: str, customer: CustomerRef, found: doctest.DocTest
) -> None:
    address = f"127.0.0.1:{service.server.port}"

    def run() -> list[str]:
        with sync.connect(address, token=admin_token) as client:
            return asyncio.run(
                run_examples(found, client=client, address=address, token=admin_token, customer=customer)
            )

    if found.name.startswith(sync.__name__):
        differing = await asyncio.to_thread(run)
    else:
        async with connect(address, token=admin_token) as client:
            differing = await run_examples(found, client=client, address=address, token=admin_token, customer=customer)
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("module", ["client", "sync"])
def test_important_calls_have_examples(module: str) -> None:
    names = {
        found.name.rpartition(".")[2] for found in EXAMPLES if found.name.startswith(f"pointbook_client.{module}.")
    }

    assert names >= CALLS
