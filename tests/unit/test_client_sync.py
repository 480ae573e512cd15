"""The generated client for threads is that for asyncio without asyncio."""

import inspect
import re
from typing import Any

import pytest

import pointbook_client
from pointbook_client import client, sync

CLASSES = ("PendingCall", "PointbookClient")
ASYNC_ONLY = {"__await__"}
NAMES = {"__aenter__": "__enter__", "__aexit__": "__exit__"}


def members(owner: Any) -> dict[str, Any]:
    """Return the functions of a class, by their names in the client for threads."""
    found = {name: value for name, value in vars(owner).items() if inspect.isroutine(value) or hasattr(value, "func")}
    return {NAMES.get(name, name): getattr(value, "func", value) for name, value in found.items()}


def signature(function: Any) -> str:
    """Return the signature of a function without asyncio."""
    text = str(inspect.signature(function)).replace("pointbook_client.sync.", "pointbook_client.client.")
    text = re.sub(r"collections\.abc\.Awaitable\[([^\]]+)\]", r"\1", text).replace("AsyncIterator", "Iterator")
    return text.replace("SyncChannel", "AioChannel").replace("AsyncStub", "Stub")


@pytest.mark.parametrize("name", CLASSES)
def test_class_has_the_same_methods_and_signatures(name: str) -> None:
    own, generated = members(getattr(client, name)), members(getattr(sync, name))

    assert set(own) - ASYNC_ONLY == set(generated)
    differing = {each for each in generated if signature(own[each]) != signature(generated[each])}
    assert differing == set()


def test_connect_has_the_same_signature() -> None:
    assert signature(client.connect) == signature(sync.connect)


def test_nothing_waits_in_the_client_for_threads() -> None:
    source = inspect.getsource(sync)

    assert not re.search(r"\b(async|await|asyncio|Aio\w+|__a\w+__)\b", source.replace("event loop", ""))
    assert not any(inspect.iscoroutinefunction(value) for value in members(sync.PointbookClient).values())


def test_every_stub_of_the_contract_is_a_property() -> None:
    from pointbook import v1  # noqa: PLC0415 - its modules are found here

    services = {
        service
        for name in dir(v1)
        if name.endswith("_pb2")
        for service in getattr(v1, name).DESCRIPTOR.services_by_name
    }
    documented = " ".join(
        inspect.getdoc(value) or "" for name, value in vars(client.PointbookClient).items() if hasattr(value, "func")
    )

    assert services
    assert all(f"The stub of {service}." in documented for service in services)


def test_exported_names_are_sorted_and_exist() -> None:
    assert sorted(pointbook_client.__all__, key=lambda name: (name.islower(), name)) == pointbook_client.__all__
    assert all(hasattr(pointbook_client, name) for name in pointbook_client.__all__)


def test_every_public_class_of_models_is_exported() -> None:
    from pointbook_client import models  # noqa: PLC0415 - only its names matter here

    public = {
        name for name, value in vars(models).items() if inspect.isclass(value) and value.__module__ == models.__name__
    }

    assert public <= set(pointbook_client.__all__)


@pytest.mark.parametrize("name", ["with_call", "future"])
def test_other_ways_to_call_a_stub_say_what_to_use(name: str) -> None:
    with sync.connect("localhost:1") as connected, pytest.raises(NotImplementedError, match="call the method"):
        getattr(connected.access.GetCallerAccess, name)(None)
