"""Parsing of the settings of SMS and e-mail providers."""

from collections.abc import Callable

import pytest

from pointbook_server.provider_settings import (
    SmtpServer,
    StartTls,
    check_apprise_url,
    check_http_url,
    parse_body,
    parse_headers,
    parse_mail_sender,
    parse_smtp_url,
    parse_statuses,
)

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("smtp://relay", SmtpServer("relay", 587, tls=False, start_tls=StartTls.AUTOMATIC)),
        ("smtp://relay:25/?starttls=off", SmtpServer("relay", 25, tls=False, start_tls=StartTls.OFF)),
        ("smtp://[::1]:25?starttls=required", SmtpServer("::1", 25, tls=False, start_tls=StartTls.REQUIRED)),
        ("smtps://mail.example.com", SmtpServer("mail.example.com", 465, tls=True, start_tls=StartTls.OFF)),
        (
            "smtp://points%40shop:p%2Fw%3A@mail.example.com",
            SmtpServer(
                "mail.example.com", 587, tls=False, start_tls=StartTls.REQUIRED, user="points@shop", password="p/w:"
            ),
        ),
        (
            "smtp://u:p@mail?starttls=automatic",
            SmtpServer("mail", 587, tls=False, start_tls=StartTls.AUTOMATIC, user="u", password="p"),
        ),
    ],
)
def test_smtp_url_is_parsed(url: str, server: SmtpServer) -> None:
    """A password requires encryption unless the URL says otherwise."""
    assert parse_smtp_url(url) == server


def test_repr_of_an_smtp_server_shows_no_secret() -> None:
    assert SECRET not in repr(parse_smtp_url(f"smtp://{SECRET}:{SECRET}@mail"))


@pytest.mark.parametrize(
    ("text", "display_name", "address"),
    [
        ("points@example.com", "", "points@example.com"),
        ("积分 Team <points@example.com>", "积分 Team", "points@example.com"),
        ('"Points, Inc." <points@example.com>', "Points, Inc.", "points@example.com"),
        ("points@bücher.example", "", "points@xn--bcher-kva.example"),
        ("points@mail.internal.example", "", "points@mail.internal.example"),
    ],
)
def test_mail_sender_is_parsed(text: str, display_name: str, address: str) -> None:
    mail_sender = parse_mail_sender(text)

    assert (mail_sender.display_name, mail_sender.address) == (display_name, address)


def test_status_ranges_are_parsed() -> None:
    assert parse_statuses("200") == {200}
    assert parse_statuses("200-202, 302,599") == {200, 201, 202, 302, 599}


def test_body_template_keeps_its_structure() -> None:
    assert parse_body('{"a": ["{to}", 1], "b": {"c": "x {text}"}}') == {"a": ["{to}", 1], "b": {"c": "x {text}"}}


def test_headers_are_parsed() -> None:
    assert parse_headers('{"Authorization": "Bearer a b", "X-Key": "k"}') == {
        "Authorization": "Bearer a b",
        "X-Key": "k",
    }


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *(
            (parse_smtp_url, text)
            for text in (
                SECRET,
                f"http://{SECRET}",
                "smtp://",
                f"smtp://{SECRET}@mail",
                f"smtp://:{SECRET}@mail",
                f"smtp://u:{SECRET}@mail:x",
                f"smtp://u:{SECRET}@mail:70000",
                f"smtp://u:{SECRET}@mail/path",
                f"smtp://u:{SECRET}@mail#part",
                f"smtp://u:{SECRET} @mail",
                f"smtp://u:{SECRET}@mail?starttls=maybe",
                f"smtp://u:{SECRET}@mail?tls=off",
                f"smtp://u:{SECRET}@mail?starttls",
                f"smtps://u:{SECRET}@mail?starttls=required",
                f"smtp://u:{SECRET}@[mail",
            )
        ),
        *(
            (parse_mail_sender, text)
            for text in ("", SECRET, f"{SECRET}@", f"é{SECRET}@example.com", f"{SECRET}\nBcc: x <a@example.com>")
        ),
        *(
            (check_http_url, text)
            for text in (
                "",
                SECRET,
                f"ftp://{SECRET}",
                "https://",
                f"https://host:x/{SECRET}",
                f"https://host/{SECRET} x",
                f"https://host/{SECRET}é",
                f"https://host/#{SECRET}",
                f"https://[host/{SECRET}",
            )
        ),
        *(
            (parse_headers, text)
            for text in (
                "",
                SECRET,
                f'["{SECRET}"]',
                f'{{"{SECRET}": 1}}',
                f'{{"X {SECRET}": "a"}}',
                f'{{"X": "{SECRET}\\r\\nEvil: 1"}}',
                f'{{"X": " {SECRET}"}}',
                f'{{"X": "{SECRET}é"}}',
                '{"X": ""}',
                f'{{"X": "{SECRET}", "x": "{SECRET}"}}',
                f'{{"Content-Length": "{SECRET}"}}',
                f'{{"Host": "{SECRET}"}}',
            )
        ),
        *(
            (parse_body, text)
            for text in (
                "",
                SECRET,
                f'{{"to": {{to}}, "text": "{{text}}", "key": "{SECRET}"}}',
                f'{{"to": "{{to}}", "key": "{SECRET}"}}',
                f'{{"text": "{{text}}", "key": "{SECRET}"}}',
                f'{{"{{to}}": "{SECRET}", "{{text}}": 1}}',
                "1",
            )
        ),
        *(
            (parse_statuses, text)
            for text in (
                "",
                SECRET,
                "2xx",
                "199",
                "600",
                "299-200",
                "200-",
                "200,,201",
                "\uff12\uff10\uff10",
                "100-299",
            )
        ),
        *((check_apprise_url, text) for text in ("", SECRET, f"json://{SECRET}", "{to}", f"json://{SECRET}/ {{to}}")),
    ],
)
def test_error_does_not_quote_a_wrong_setting(parse: Callable[[str], object], text: str) -> None:
    """Settings may contain secrets."""
    with pytest.raises(ValueError, match=r"must|cannot|names|may") as caught:
        parse(text)

    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
