"""Fuzz targets: the parsers of untrusted input, as functions of bytes.

A target raises only for a defect.

Run as a program, this is a coverage-guided fuzzer of all targets. It needs atheris, which is not a dependency of
Pointbook (`pip install atheris`), and accepts libFuzzer's options, such as `-max_total_time=60 CORPUS_FOLDER`.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from pointbook.v1.programs_pb2 import ListStoresRequest
from pointbook_common import text
from pointbook_common.shopline_webhooks import select_headers
from pointbook_server.customers import emails, phones
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import Fields, read_etag
from shopline_shim import body_reader, callback_secret, quarantine_cause, signature, translate, translate_missed_call

SECRET = "app-secret"
NOW_MS = 1_780_000_000_000
HEADERS = {"X-Shopline-Merchant-Id": "2000001234", "X-Shopline-Shop-Id": "1718263946864"}
POINTS = {
    "buyer_id": "2404721679",
    "points_balance": 20,
    "points_expiry_time": "",
    "store_id": "1718263946864",
    "update_type": "INCREASE",
    "updated_at": 1721829526566,
    "updated_scene": "SUCCESSFUL_REGISTRATION",
    "updated_value": 20,
}
CUSTOMER = {"id": "1", "email": "a@example.com", "phone": "00886912345678", "updated_at": "2026-05-01T00:00:00+08:00"}
REDACT = {"customer": {"id": "1"}, "shop_id": "1", "update_time": "2026-05-01T00:00:00+08:00"}
ERASURE = {"store_id": "1", "store_domain": "a.myshopline.com", "update_time": "2026-05-01T00:00:00Z"}
CALL = {"merchant_id": "2", "caller_number": "+886912345678", "called_number": "+886212345678", "provider_call_id": "c"}
CALL_FORM = b"merchant_id=2&caller_number=%2B886912345678&called_number=+886212345678&provider_call_id=c&call_time=1"
CORPUS = (
    *(json.dumps(body).encode() for body in (POINTS, CUSTOMER, REDACT, ERASURE, CALL)),
    CALL_FORM,
    b"+886 912-345-678",
    b"Ann.Lee+shop@xn--bcher-kva.example",
    signature.sign(SECRET, b"{}").encode(),
    pagination.write_token("scope", (1, "a")).encode(),
    b"customers/update, customers/update",
    b"Bearer pb_0123456789abcdef_secret",
)


def translate_points_update(data: bytes) -> None:
    """Translate a points webhook; the message survives a round trip."""
    with contextlib.suppress(translate.MalformedWebhook):
        update = translate.points_update(HEADERS, data)
        assert update.updated_value >= 0
        assert type(update).FromString(update.SerializeToString()) == update


def translate_customer_updates(data: bytes) -> None:
    """Translate a customer webhook of every topic."""
    for topic in translate.CUSTOMER_TOPICS:
        with contextlib.suppress(translate.MalformedWebhook):
            update = translate.customer_update(topic, HEADERS, data)
            assert type(update).FromString(update.SerializeToString()) == update


def translate_store_erasure(data: bytes) -> None:
    """Translate a store erasure."""
    with contextlib.suppress(translate.MalformedWebhook):
        translate.store_erasure(HEADERS, data).SerializeToString()


def verify_signature(data: bytes) -> None:
    """Verify a signature header; none matches by chance."""
    assert not signature.verify([SECRET], b"another body", data.decode("latin-1"))


def read_headers(data: bytes) -> None:
    """Read the topic and merchant of the headers, and select those that are stored."""
    value = data.decode("latin-1")
    translate.read_topic([value, value])
    translate.read_merchant_id({"X-Shopline-Merchant-Id": value})
    select_headers([("x-shopline-topic", value), (value, "value")])


def translate_callback(data: bytes) -> None:
    """Translate a callback of every media type."""
    assert not callback_secret.verify([SECRET], {"authorization": data.decode("latin-1")})
    for kind in ("application/json", "application/x-www-form-urlencoded", data[:40].decode("latin-1")):
        with contextlib.suppress(translate_missed_call.MalformedCall):
            call = translate_missed_call.missed_call(
                {"content-type": kind}, data[:60].decode("latin-1"), data, {}, NOW_MS
            )
            call.SerializeToString()


def parse_phone(data: bytes) -> None:
    """Parse a phone number; the result parses as itself."""
    written = data.decode("utf-8", "replace")
    for region in ("", "US", "AR"):
        phone = phones.read(written, region)
        if phone is not None:
            again = phones.read(phone.e164)
            assert again is not None, f"{phone.e164} of {region} does not parse"
            assert again.key == phone.key
            assert phone.e164 in phones.forms(phone.key) or phones.number_type(phone.e164) >= 0
    text.pasted(written)
    text.phone_text(written)


def parse_email(data: bytes) -> None:
    """Parse an email address; the result parses as itself."""
    address = emails.read(data.decode("utf-8", "replace"))
    if address is not None:
        again = emails.read(address.written)
        assert again is not None
        assert again.key == address.key


def parse_tokens(data: bytes) -> None:
    """Parse a page token and an etag."""
    written = data.decode("utf-8", "replace")
    revision = read_etag(written)
    assert revision is None or -1 <= revision < 2**63
    pagination.read_page(Fields(), ListStoresRequest(page_token=written), "scope", first=(0, ""))


MODULES = (
    body_reader,
    callback_secret,
    emails,
    pagination,
    phones,
    quarantine_cause,
    signature,
    text,
    translate,
    translate_missed_call,
)
"""The modules that the coverage-guided fuzzer instruments."""
TARGETS: tuple[Callable[[bytes], None], ...] = (
    translate_points_update,
    translate_customer_updates,
    translate_store_erasure,
    verify_signature,
    read_headers,
    translate_callback,
    parse_phone,
    parse_email,
    parse_tokens,
)


def run_target(data: bytes) -> None:
    """Run the target that the first byte selects on the rest."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def fuzz(corpus_folder: Path) -> None:
    """Write the corpus, and run atheris on all targets. It ends the process."""
    atheris: Any = importlib.import_module("atheris")
    for number, data in enumerate(CORPUS):
        for target in range(len(TARGETS)):
            (corpus_folder / f"input-{number}-{target}").write_bytes(bytes((target,)) + data)
    for function in _functions(*MODULES):
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, run_target)
    atheris.Fuzz()


def _functions(*modules: ModuleType) -> Iterator[FunctionType]:
    """Yield the functions of the modules and the methods of their classes."""
    for module in modules:
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        methods = [value for each in own if isinstance(each, type) for value in vars(each).values()]
        yield from (value for value in (*own, *methods) if isinstance(value, FunctionType))


if __name__ == "__main__":
    fuzz(Path(sys.argv[-1]))
