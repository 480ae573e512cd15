"""Codes as people type and paste them are normalized before they are compared."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pointbook_server.validation_codes.code_format import DIGITS, LETTERS_AND_DIGITS, normalize_code
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import guess_code, issue_and_read_code, read_audit
from support.connections import superuser
from support.redemption import PENDING, earn, redeem, redeem_request, validate_request
from support.refusals import refused
from support.servers import Service
from support.shops import Shop

CODE_ONLY = {"": "$code"}
DIGIT_CODES = {"message_templates": CODE_ONLY}
LETTER_CODES = {"code_length": 10, "alphanumeric": True, "message_templates": CODE_ONLY}
ALPHABETS = {"digits": DIGIT_CODES, "letters": LETTER_CODES}


@pytest.fixture(params=ALPHABETS)
async def code_shop(request: pytest.FixtureRequest, service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes of one alphabet."""
    validation = ALPHABETS[request.param]
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def count_attempts(service: Service, challenge_id: str) -> int:
    """Return the number of wrong guesses that a challenge has counted."""
    query = "SELECT attempts + unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        return int(await connection.fetchval(query, challenge_id))


def in_script(code: str, first: int, last: str = "9") -> str:
    """Return a code with the digits of another script, of which `first` is the zero."""
    return "".join(chr(first + int(character)) if "0" <= character <= last else character for character in code)


def full_width(code: str) -> str:
    """Return a code in full-width letters and digits."""
    return "".join(chr(ord(character) + 0xFEE0) for character in code)


WAYS_TO_TYPE: dict[str, Callable[[str], str]] = {
    "grouped by a blank": lambda code: f"{code[:3]} {code[3:]}",
    "grouped by a dash": lambda code: f"{code[:3]}-{code[3:]}",
    "with a blank behind it": lambda code: f"{code} ",
    "with a line break behind it": lambda code: f"{code}\r\n",
    "with a tab before it": lambda code: f"\t{code}",
    "spaced out": " ".join,
    "with no-break spaces": lambda code: f"\u00a0{code[:2]}\u202f{code[2:]}\u3000",
    "with a minus": lambda code: f"{code[:3]}\u2212{code[3:]}",
    "with an en dash between blanks": lambda code: f"{code[:3]} \u2013 {code[3:]}",
    "with a soft hyphen": lambda code: f"{code[:3]}\u00ad{code[3:]}",
    "with the long vowel mark of a Japanese keyboard": lambda code: f"{code[:3]}\u30fc{code[3:]}",
    "with a byte-order mark and zero width": lambda code: f"\ufeff{code[:3]}\u200b\u2060{code[3:]}",
    "between marks of direction": lambda code: f"\u202a{code}\u202c",
    "full-width": full_width,
    "full-width, in small letters": lambda code: full_width(code.lower()),
    "in small letters": str.lower,
    "in Arabic-Indic digits": lambda code: in_script(code, 0x660),
    "in Persian digits": lambda code: in_script(code, 0x6F0),
    "in Devanagari digits": lambda code: in_script(code, 0x966),
    "in mathematical digits": lambda code: in_script(code, 0x1D7CE),
}


async def test_every_way_of_typing_a_code_is_right(service: Service, client: Client, code_shop: Shop) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    wrong = [
        name for name, type_code in WAYS_TO_TYPE.items() if not await guess_code(client, code_shop, type_code(code))
    ]

    assert wrong == []
    assert await count_attempts(service, challenge_id) == 0


@pytest.mark.parametrize("name", ["grouped by a blank", "full-width, in small letters", "in Arabic-Indic digits"])
async def test_points_are_redeemed_with_a_code_as_typed(
    service: Service, client: Client, code_shop: Shop, name: str
) -> None:
    """A repeated call that types the code in another way returns the same redemption."""
    challenge_id, code = await issue_and_read_code(service, code_shop)
    request = redeem_request(code_shop, 100, validation_code=WAYS_TO_TYPE[name](code), challenge_id=challenge_id)
    redemption = await redeem(client, request)
    request.validation_code = code

    assert redemption.state == PENDING
    assert await redeem(client, request) == redemption


NO_CODES = {
    "blanks": " \t \u3000",
    "dashes": "--\u2014\u2212",
    "nothing to see": "\u200b\ufeff\u00ad\u2060",
    "punctuation": "...!?",
    "a plus": "\uff0b",
    "an emoji": "\U0001f511\ufe0f",
    "a mark without its letter": "\u0301",
    "circled digits": "\u2460\u2461",
}


@pytest.mark.parametrize("typed", NO_CODES.values(), ids=NO_CODES)
async def test_code_without_digits_or_letters_is_an_invalid_field(
    service: Service, client: Client, code_shop: Shop, typed: str
) -> None:
    """It is neither counted nor in the audit."""
    challenge_id, code = await issue_and_read_code(service, code_shop)
    for _ in range(6):
        for call in (
            client.redemption.ValidateRedemption(validate_request(code_shop, 100, validation_code=typed)),
            redeem(client, redeem_request(code_shop, 100, validation_code=typed, challenge_id=challenge_id)),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
            assert found.fields == {"validation_code": "must have digits or letters"}

    assert await count_attempts(service, challenge_id) == 0
    assert {action for action, _, _ in await read_audit(service, code_shop)} == {"ISSUE", "DELIVER"}
    assert await guess_code(client, code_shop, code)


CHANGES: dict[str, Callable[[str], str]] = {
    "a letter before it": lambda code: f"x{code}",
    "a letter inside": lambda code: f"{code[:3]}o{code[3:]}",
    "a letter of another script behind it": lambda code: f"{code}\u0430",
    "a dot inside": lambda code: f"{code[:3]}.{code[3:]}",
    "a digit missing": lambda code: code[1:],
    "a combining mark": lambda code: f"{code}\u0301",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_wrong_code_is_not_repaired(
    service: Service, client: Client, code_shop: Shop, change: Callable[[str], str]
) -> None:
    """A code with a character too many or too few is a wrong guess."""
    challenge_id, code = await issue_and_read_code(service, code_shop)

    assert not await guess_code(client, code_shop, change(code))
    assert await count_attempts(service, challenge_id) == 1


@pytest.mark.parametrize(("letter", "lookalike"), [("S", "\u017f"), ("K", "\u212a"), ("A", "\u0410")])
async def test_lookalike_of_a_letter_is_wrong(
    service: Service, client: Client, shop: Shop, letter: str, lookalike: str
) -> None:
    """Unicode case mapping turns the long s into S and the Kelvin sign into k."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=LETTER_CODES)
    await earn(client, shop, 500)
    code = ""
    while letter not in code:
        challenge_id, code = await issue_and_read_code(service, shop)
        service.clock.move(0 if letter in code else 3_600)

    assert not await guess_code(client, shop, code.replace(letter, lookalike))
    assert await guess_code(client, shop, code)
    assert await count_attempts(service, challenge_id) == 1
    service.clock.now_ms = NOW_MS


@pytest.mark.parametrize(
    ("typed", "is_wrong"),
    [
        (" " * 26 + "123456", False),
        (" " * 27 + "123456", True),
        ("\u200b" * 32 + "1", True),
        ("1" * 33, True),
        ("1\x00", True),
        ("1\x7f2", True),
    ],
)
async def test_length_limit_applies_to_the_text_as_typed(
    client: Client, code_shop: Shop, *, typed: str, is_wrong: bool
) -> None:
    """32 characters, ignored ones included, without most control characters."""
    call: Any = client.redemption.ValidateRedemption(validate_request(code_shop, 100, validation_code=typed))
    if is_wrong:
        found = await refused(call)
        assert set(found.fields) == {"validation_code"}
    else:
        assert [violation.code for violation in (await call).violations] == [808]


def test_normalizing_keeps_every_alphabet() -> None:
    for alphabet in (DIGITS, LETTERS_AND_DIGITS):
        assert normalize_code(alphabet) == alphabet
