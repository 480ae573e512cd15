"""Codes as people type and paste them: read before they are compared, and never guessed at the customer's expense."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pointbook_server.validation_codes.model import DIGITS, LETTERS_AND_DIGITS, normalised_code
from support.codes import audit, is_right, issued
from support.harness import NOW_MS, Client, Service, Shop, refused
from support.points import superuser
from support.redemption import PENDING, earn, redeem, redeem_request, validate_request

PLAIN = {"": "$code"}
DIGIT_CODES = {"message_templates": PLAIN}
LETTER_CODES = {"code_length": 10, "alphanumeric": True, "message_templates": PLAIN}
ALPHABETS = {"digits": DIGIT_CODES, "letters": LETTER_CODES}


@pytest.fixture(params=ALPHABETS)
async def till(request: pytest.FixtureRequest, service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes of one alphabet, with a buyer who has 500 points."""
    validation = ALPHABETS[request.param]
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def attempts(service: Service, challenge_id: str) -> int:
    """Return how many wrong guesses a challenge has counted."""
    query = "SELECT attempts + unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        return int(await connection.fetchval(query, challenge_id))


def moved(code: str, first: int, last: str = "9") -> str:
    """Write the digits of a code in another script, of which `first` is the zero."""
    return "".join(chr(first + int(character)) if "0" <= character <= last else character for character in code)


def full_width(code: str) -> str:
    """Write a code in full-width letters and digits."""
    return "".join(chr(ord(character) + 0xFEE0) for character in code)


TYPED: dict[str, Callable[[str], str]] = {
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
    "in Arabic-Indic digits": lambda code: moved(code, 0x660),
    "in Persian digits": lambda code: moved(code, 0x6F0),
    "in Devanagari digits": lambda code: moved(code, 0x966),
    "in mathematical digits": lambda code: moved(code, 0x1D7CE),
}


async def test_a_code_is_right_however_it_is_typed(service: Service, client: Client, till: Shop) -> None:
    """ValidateRedemption takes every form, counts none as wrong, and the code is as good as before."""
    challenge_id, code = await issued(service, till)
    wrong = [name for name, typed in TYPED.items() if not await is_right(client, till, typed(code))]

    assert wrong == []
    assert await attempts(service, challenge_id) == 0


@pytest.mark.parametrize("name", ["grouped by a blank", "full-width, in small letters", "in Arabic-Indic digits"])
async def test_points_are_redeemed_by_a_code_as_it_was_typed(
    service: Service, client: Client, till: Shop, name: str
) -> None:
    """And a repetition of the call that types it in another way is answered what is stored."""
    challenge_id, code = await issued(service, till)
    request = redeem_request(till, 100, validation_code=TYPED[name](code), challenge_id=challenge_id)
    redemption = await redeem(client, request)
    request.validation_code = code

    assert redemption.state == PENDING
    assert await redeem(client, request) == redemption


NO_CODE = {
    "blanks": " \t \u3000",
    "dashes": "--\u2014\u2212",
    "nothing to see": "\u200b\ufeff\u00ad\u2060",
    "punctuation": "...!?",
    "a plus": "\uff0b",
    "an emoji": "\U0001f511\ufe0f",
    "a mark without its letter": "\u0301",
    "circled digits": "\u2460\u2461",
}


@pytest.mark.parametrize("typed", NO_CODE.values(), ids=NO_CODE)
async def test_what_has_no_digit_or_letter_is_no_guess(
    service: Service, client: Client, till: Shop, typed: str
) -> None:
    """INVALID_ARGUMENT by either method, named and without the text; the audit has no guess, and nothing is counted."""
    challenge_id, code = await issued(service, till)
    for _ in range(6):
        for call in (
            client.redemption.ValidateRedemption(validate_request(till, 100, validation_code=typed)),
            redeem(client, redeem_request(till, 100, validation_code=typed, challenge_id=challenge_id)),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
            assert found.fields == {"validation_code": "must have digits or letters"}

    assert await attempts(service, challenge_id) == 0
    assert {action for action, _, _ in await audit(service, till)} == {"ISSUE", "DELIVER"}
    assert await is_right(client, till, code)


WRONG: dict[str, Callable[[str], str]] = {
    "a letter before it": lambda code: f"x{code}",
    "a letter inside": lambda code: f"{code[:3]}o{code[3:]}",
    "a letter of another script behind it": lambda code: f"{code}\u0430",
    "a dot inside": lambda code: f"{code[:3]}.{code[3:]}",
    "a digit missing": lambda code: code[1:],
    "a combining mark": lambda code: f"{code}\u0301",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
async def test_a_wrong_code_is_not_repaired(
    service: Service, client: Client, till: Shop, change: Callable[[str], str]
) -> None:
    """What has a character too many, or too few, is a wrong guess like any other."""
    challenge_id, code = await issued(service, till)

    assert not await is_right(client, till, change(code))
    assert await attempts(service, challenge_id) == 1


@pytest.mark.parametrize(("letter", "lookalike"), [("S", "\u017f"), ("K", "\u212a"), ("A", "\u0410")])
async def test_the_lookalike_of_a_letter_is_wrong(
    service: Service, client: Client, shop: Shop, letter: str, lookalike: str
) -> None:
    """Unicode makes S of the long s and k of the Kelvin sign, but no code has either of them."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=LETTER_CODES)
    await earn(client, shop, 500)
    code = ""
    while letter not in code:
        challenge_id, code = await issued(service, shop)
        service.clock.move(0 if letter in code else 3_600)

    assert not await is_right(client, shop, code.replace(letter, lookalike))
    assert await is_right(client, shop, code)
    assert await attempts(service, challenge_id) == 1
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
async def test_what_was_typed_is_bounded_as_it_came(client: Client, till: Shop, *, typed: str, is_wrong: bool) -> None:
    """32 characters, those that count for nothing included, and no control characters but tabs and line breaks."""
    call: Any = client.redemption.ValidateRedemption(validate_request(till, 100, validation_code=typed))
    if is_wrong:
        found = await refused(call)
        assert set(found.fields) == {"validation_code"}
    else:
        assert [violation.code for violation in (await call).violations] == [808]


def test_no_alphabet_has_what_a_typed_code_loses() -> None:
    """A blank, a dash or a small letter in an alphabet would make some codes impossible to type."""
    for alphabet in (DIGITS, LETTERS_AND_DIGITS):
        assert normalised_code(alphabet) == alphabet
