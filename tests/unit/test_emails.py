"""E-mail addresses as people write and paste them."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pointbook_server.customers import emails

LETTERS = "abzABZ.\u00df\u1e9e\u0130\u0131\u017f\u212a\ufb01\uff21\uff41\u00e9\u00c9\u03a3\u03c3\u03c2\u0391e\u0301"


@pytest.mark.parametrize(
    ("written", "key", "envelope"),
    [
        ("Ada.Lovelace@Example.COM", "ada.lovelace@example.com", "Ada.Lovelace@example.com"),
        ("stra\u00df@example.com", "stra\u00df@example.com", "stra\u00df@example.com"),
        ("STRA\u1e9e@example.com", "stra\u00df@example.com", "STRA\u1e9e@example.com"),
        ("\u00c4da@example.com", "\u00e4da@example.com", "\u00c4da@example.com"),
        ("\u0130@example.com", "i\u0307@example.com", "\u0130@example.com"),
        ("\u0131@example.com", "\u0131@example.com", "\u0131@example.com"),
        ("\u017f@example.com", "\u017f@example.com", "\u017f@example.com"),
        ("\ufb01@example.com", "\ufb01@example.com", "\ufb01@example.com"),
        ("\uff21da@example.com", "\uff41da@example.com", "\uff21da@example.com"),
        ("\u212a@example.com", "k@example.com", "\u212a@example.com"),
        ("\u039f\u0394\u039f\u03a3@example.com", "\u03bf\u03b4\u03bf\u03c2@example.com", None),
        ("\u039f\u0394\u039f\u03a3.A@example.com", "\u03bf\u03b4\u03bf\u03c3.a@example.com", None),
        ("cafe\u0301@example.com", "caf\u00e9@example.com", "cafe\u0301@example.com"),
        ("a@B\u00dcCHER.example", "a@b\u00fccher.example", "a@xn--bcher-kva.example"),
        ("a@xn--bcher-kva.example", "a@b\u00fccher.example", "a@xn--bcher-kva.example"),
        ("a@XN--BCHER-KVA.example", "a@b\u00fccher.example", "a@xn--bcher-kva.example"),
        ("a@stra\u00dfe.de", "a@stra\u00dfe.de", "a@xn--strae-oqa.de"),
        ("a@example\u3002com", "a@example.com", "a@example.com"),
        ("INFO@example.com", "info@example.com", "INFO@example.com"),
        ("o'b+1@example.com", "o'b+1@example.com", "o'b+1@example.com"),
    ],
)
def test_addresses_are_stored_as_written_and_compared_in_lower_case(
    written: str, key: str, envelope: str | None
) -> None:
    assert emails.read(written) == (written, key, written if envelope is None else envelope)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("stra\u00df@example.com", "strass@example.com"),
        ("\u017f@example.com", "s@example.com"),
        ("\ufb01@example.com", "fi@example.com"),
        ("\uff41da@example.com", "ada@example.com"),
        ("\u0130@example.com", "i@example.com"),
        ("\u0131@example.com", "i@example.com"),
        ("\u03bf\u03b4\u03bf\u03c2@example.com", "\u03bf\u03b4\u03bf\u03c3@example.com"),
        ("\u2460@example.com", "1@example.com"),
        ("caf\u00e9@example.com", "cafe@example.com"),
        ("a@stra\u00dfe.de", "a@strasse.de"),
        ("a.b@example.com", "ab@example.com"),
        ("a+1@example.com", "a@example.com"),
        ("ada.@docomo.ne.jp", "ada@docomo.ne.jp"),
    ],
)
def test_different_mailboxes_have_different_keys(one: str, other: str) -> None:
    """Casefold or NFKC would merge them."""
    first, second = emails.read(one), emails.read(other)
    assert first is not None
    assert second is not None
    assert first.key != second.key


@pytest.mark.parametrize(
    "written",
    [
        " ada@example.com ",
        "\u00a0ada@example.com\u3000",
        "ada@example.com\r\n",
        "\u202aada@example.com\u202c",
        "\ufeffada@exam\u00adple.com",
        "ada\u200b@\u2060example.com",
        "\n\u200e ada@example.com\ufe0f\t",
    ],
)
def test_invisible_characters_and_surrounding_blanks_are_dropped(written: str) -> None:
    address = ("ada@example.com",) * 3
    assert emails.read(written) == address


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "ada",
        "a@b",
        "a@@example.com",
        "a b@example.com",
        "a@example.com\nb",
        "a@example.com\r\nBcc: b@example.com",
        "a@exam\tple.com",
        "a\x00@example.com",
        "Ada <a@example.com>",
        '"a b"@example.com',
        '"ada."@docomo.ne.jp',
        "a@[127.0.0.1]",
        "ada\uff20example.com",
        "a@example.com, b@example.com",
        f"a@{'b' * 250}.com",
    ],
)
def test_other_texts_are_not_addresses(written: str) -> None:
    assert emails.read(written) is None


@pytest.mark.parametrize(
    "written",
    [
        "a@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.com",
        "a@xn--mgba3gch31f060k.com",
        "a@\u0dc1\u0dca\u200d\u0dbb\u0dd3.com",
        "a@xn--10cl1a0b660p.com",
        "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc@example.com",
        "\u0915\u094d\u200d\u0937@example.com",
        "\u0915\u094d\u200b\u200d\u200b\u0937@example.com",
    ],
)
def test_a_joiner_inside_a_word_makes_an_address_invalid(written: str) -> None:
    """In Persian or Hindi, domains with and without a joiner have different owners."""
    assert emails.read(written) is None


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
def test_joiners_at_the_ends_and_next_to_ascii_are_dropped(joiner: str) -> None:
    read = emails.read(f"\u202a{joiner}\u202aada{joiner}@b\u00fccher{joiner}.example{joiner}")
    assert read == ("ada@b\u00fccher.example", "ada@b\u00fccher.example", "ada@xn--bcher-kva.example")


@pytest.mark.parametrize(
    "domain",
    [
        "docomo.ne.jp",
        "ezweb.ne.jp",
        "biz.ezweb.ne.jp",
        "au.com",
        "softbank.ne.jp",
        "i.softbank.jp",
        "t.vodafone.ne.jp",
        "jp-q.ne.jp",
        "disney.ne.jp",
        "ymobile.ne.jp",
        "ymobile1.ne.jp",
        "y-mobile.ne.jp",
        "emnet.ne.jp",
        "willcom.com",
        "wm.pdx.ne.jp",
        "uqmobile.jp",
        "DoCoMo.NE.jp",
    ],
)
@pytest.mark.parametrize("local_part", ["ada.", "a..b", ".ada", "A.b..c...d.", "-a-..", "a_/+."])
def test_dots_of_japanese_carriers_are_accepted(local_part: str, domain: str) -> None:
    """SMTP envelopes have such a local part in quotes.

    Source: https://www.rfc-editor.org/rfc/rfc5321#section-4.1.2
    """
    key = f"{local_part}@{domain}".lower()
    assert emails.read(f"{local_part}@{domain}") == (
        f"{local_part}@{domain}",
        key,
        f'"{local_part}"@{domain.lower()}',
    )


@pytest.mark.parametrize(
    "written",
    [
        "ada.@example.com",
        "a..b@gmail.com",
        "a..b@evil.docomo.ne.jp",
        "a..b@docomo.ne.jp.example.com",
        "a..b@xdocomo.ne.jp",
        "...@docomo.ne.jp",
        ".@ezweb.ne.jp",
        "@docomo.ne.jp",
        "a. b@docomo.ne.jp",
        'a."b@docomo.ne.jp',
        "a.\u00e9.@docomo.ne.jp",
        "a.\r\n.b@docomo.ne.jp",
        f"{'a' * 64}.@docomo.ne.jp",
    ],
)
def test_other_domains_do_not_accept_dots_anywhere(written: str) -> None:
    assert emails.read(written) is None


@example("\u0390", "\u0390")
@example("\u1e9e", "ss")
@given(st.text(LETTERS, min_size=1, max_size=8), st.text(LETTERS, min_size=1, max_size=8))
def test_addresses_are_equal_exactly_if_their_lower_case_is(one: str, other: str) -> None:
    first, second = emails.read(f"{one}@example.com"), emails.read(f"{other}@example.com")
    if first is None or second is None:
        return
    assert (first.key == second.key) == (_lower(one) == _lower(other))
    again = emails.read(first.key)
    assert again is not None
    assert again.key == first.key
    assert emails.read(first.written) == first


@given(st.text(max_size=40))
def test_reading_is_idempotent_and_never_fails(text: str) -> None:
    for written in (text, f"{text}@example.com", f"{text}@docomo.ne.jp", f"a@{text}"):
        found = emails.read(written)
        if found is not None:
            again = emails.read(found.key)
            assert again is not None
            assert (again.key, emails.read(found.written)) == (found.key, found)


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
