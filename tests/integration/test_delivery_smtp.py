"""E-mail by SMTP: the messages that arrive, and every kind of failure."""

import asyncio
import logging
import socket
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from pointbook_server.delivery import smtp
from pointbook_server.delivery.sender import DeliveryFailedError, DeliveryUncertainError, FailureKind
from pointbook_server.delivery.smtp import CONNECTIONS_MAX, SmtpSender
from pointbook_server.provider_settings import parse_mail_sender, parse_smtp_url
from support.certificates import loopback_tls
from support.provider_servers import (
    CODE,
    LOOP_DELAY_SECONDS_MAX,
    MESSAGE,
    PASSWORD,
    TEXT,
    error_chain_text,
    loop_delays,
    mail_server,
)
from support.waiting import until

FROM = parse_mail_sender("Points Team <points@shop.example.com>")


def build_sender(port: int, *, scheme: str = "smtp", login: str = "", options: str = "") -> SmtpSender:
    """Build a sender for a server on loopback."""
    return SmtpSender(parse_smtp_url(f"{scheme}://{login}127.0.0.1:{port}{options}"), FROM)


def has_secrets(error: BaseException) -> bool:
    """Return whether an error contains anything that a log must not."""
    text = error_chain_text(error)
    return any(secret in text for secret in (CODE, PASSWORD, MESSAGE.destination, "b.private", "secret-of-provider"))


async def test_e_mail_arrives_unchanged() -> None:
    async with mail_server() as server:
        await build_sender(server.port).send(replace(MESSAGE, text=TEXT, subject="兑换码 🎁 for $5"))
        envelope, email = server.emails[0]

    assert email.get_content().replace("\r\n", "\n").removesuffix("\n") == TEXT.replace("\r\n", "\n")
    assert (envelope.mail_from, envelope.rcpt_tos) == ("points@shop.example.com", ["b.private@example.com"])
    assert email["From"] == "Points Team <points@shop.example.com>"
    assert email["To"] == "b.private@example.com"
    assert email["Subject"] == "兑换码 🎁 for $5"
    assert email["Auto-Submitted"] == "auto-generated"
    assert email.get_content_type() == "text/plain"
    assert email.get_content_charset() == "utf-8"
    assert abs(parsedate_to_datetime(email["Date"]).timestamp() - time.time()) < 60


async def test_message_ids_are_unique_and_reveal_nothing() -> None:
    """A mail program hides the second e-mail with the same Message-ID."""
    async with mail_server() as server:
        sender = build_sender(server.port)
        await sender.send(MESSAGE)
        await sender.send(MESSAGE)
        first, second = (str(email["Message-ID"]) for _, email in server.emails)

    assert first != second
    assert first.endswith("@shop.example.com>")
    assert CODE not in first
    assert MESSAGE.challenge_id not in first


@pytest.mark.parametrize("ending", ["\r\n", "\n", "\r", "\u2028", "\x85", "\x0b", "\x00"])
async def test_subject_cannot_add_headers(ending: str) -> None:
    async with mail_server() as server:
        await build_sender(server.port).send(
            replace(MESSAGE, subject=f"Points{ending}Bcc: evil@example.com{ending}{ending}body")
        )
        envelope, email = server.emails[0]

    assert email["Subject"] == "Points Bcc: evil@example.com body"
    assert email["Bcc"] is None
    assert envelope.rcpt_tos == ["b.private@example.com"]
    assert CODE in email.get_content()


async def test_empty_subject_adds_no_header() -> None:
    async with mail_server() as server:
        await build_sender(server.port).send(replace(MESSAGE, subject=" \n"))

        assert server.emails[0][1]["Subject"] is None


@pytest.mark.parametrize(
    ("destination", "arrives_at"),
    [("b@bücher.example", "b@xn--bcher-kva.example"), ("josé@example.com", "josé@example.com")],
)
async def test_addresses_beyond_ascii_are_supported(destination: str, arrives_at: str) -> None:
    async with mail_server() as server:
        await build_sender(server.port).send(replace(MESSAGE, destination=destination, subject="é"))
        envelope, email = server.emails[0]

    assert envelope.rcpt_tos == [arrives_at]
    assert email["To"] == arrives_at
    assert email["Subject"] == "é"


@pytest.mark.parametrize(
    ("destination", "sent_to"),
    [
        ("ada.@docomo.ne.jp", '"ada."@docomo.ne.jp'),
        ("a..b@docomo.ne.jp", '"a..b"@docomo.ne.jp'),
        (".a@t.vodafone.ne.jp", '".a"@t.vodafone.ne.jp'),
        ("Ada..@EZweb.ne.jp", '"Ada.."@ezweb.ne.jp'),
        ("Ada.B@docomo.ne.jp", "Ada.B@docomo.ne.jp"),
        ("Ada@Example.COM", "Ada@example.com"),
        ("stra\u00dfe@stra\u00dfe.de", "stra\u00dfe@xn--strae-oqa.de"),
        ("\u0130.\ufb01@example.com", "\u0130.\ufb01@example.com"),
        ("cafe\u0301@example.com", "cafe\u0301@example.com"),
        ("o'b{1}+2@example.com", "o'b{1}+2@example.com"),
        ("=?utf-8?q?ada?=@example.com", "=?utf-8?q?ada?=@example.com"),
    ],
)
async def test_rcpt_and_to_name_exactly_the_given_mailbox(destination: str, sent_to: str) -> None:
    """Local parts that need quotes are quoted, and the domain is in ASCII."""
    async with mail_server() as server:
        await build_sender(server.port).send(replace(MESSAGE, destination=destination))
        envelope, email = server.emails[0]

    assert server.recipients == [f"TO:<{sent_to}>"]
    assert isinstance(envelope.content, bytes)
    assert f"To: {sent_to}\r\n".encode() in envelope.content
    assert CODE in email.get_content()


@pytest.mark.parametrize("line_break", ["=0D=0A", "=0A", "=0D"])
async def test_address_cannot_add_headers(line_break: str) -> None:
    """An encoded word is a valid local part, and is not decoded."""
    destination = f"=?utf-8?q?a{line_break}Bcc=3A_evil=40example.com{line_break}?=@example.com"
    async with mail_server() as server:
        await build_sender(server.port).send(replace(MESSAGE, destination=destination))
        _, email = server.emails[0]

    assert email["Bcc"] is None
    assert server.recipients == [f"TO:<{destination}>"]


@pytest.mark.parametrize("options", ["", "?starttls=off"])
async def test_server_without_smtputf8_refuses_addresses_beyond_ascii(options: str) -> None:
    async with mail_server() as server:
        server.takes_utf8 = False
        sender = build_sender(server.port, options=options)
        with pytest.raises(DeliveryFailedError) as caught:
            await sender.send(replace(MESSAGE, destination="jos\u00e9@example.com"))
        await sender.send(replace(MESSAGE, destination="jose@b\u00fccher.example"))

    assert caught.value.kind is FailureKind.REFUSED
    assert "beyond ASCII" in str(caught.value)
    assert "jos" not in error_chain_text(caught.value)
    assert server.recipients == ["TO:<jose@xn--bcher-kva.example>"]


@pytest.mark.parametrize("destination", ["", "b", "a@example.com, c@example.com", "a@example.com\r\nDATA", "<a@b.c> x"])
async def test_invalid_address_is_refused_without_a_connection(destination: str) -> None:
    async with mail_server() as server:
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(server.port).send(replace(MESSAGE, destination=destination))

        assert caught.value.kind is FailureKind.REFUSED
        assert server.max_open == 0


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("status", [421, 450, 550, 554])
async def test_4xx_or_5xx_reply_is_a_definite_failure(command: str, status: int) -> None:
    async with mail_server() as server:
        server.replies[command] = f"{status} secret-of-provider: no b.private@example.com, {CODE}"
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(server.port).send(MESSAGE)

    assert caught.value.kind is FailureKind.REFUSED
    assert str(status) in str(caught.value)
    assert not has_secrets(caught.value)


async def test_closed_port_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(unused.getsockname()[1]).send(MESSAGE)

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert "ConnectionRefusedError" in str(caught.value)
    assert not has_secrets(caught.value)


async def test_server_that_never_greets_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "HANDOVER_TIMEOUT_SECONDS", 0.2)

    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    async with server:
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(server.sockets[0].getsockname()[1]).send(MESSAGE)

    assert caught.value.kind is FailureKind.UNREACHABLE


async def test_missing_answer_after_the_content_is_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "RESPONSE_TIMEOUT_SECONDS", 0.2)
    async with mail_server() as server:
        server.at_data = "hang"
        with pytest.raises(DeliveryUncertainError) as caught:
            await build_sender(server.port).send(MESSAGE)

    assert not has_secrets(caught.value)


async def test_connection_closed_after_the_content_is_uncertain() -> None:
    async with mail_server() as server:
        server.at_data = "cut"
        with pytest.raises(DeliveryUncertainError) as caught:
            await build_sender(server.port).send(MESSAGE)

        assert len(server.emails) == 1
    assert not has_secrets(caught.value)


async def test_unknown_reply_is_uncertain() -> None:
    async with mail_server() as server:
        server.replies["DATA"] = "299 secret-of-provider"
        with pytest.raises(DeliveryUncertainError) as caught:
            await build_sender(server.port).send(MESSAGE)

    assert not has_secrets(caught.value)


@pytest.mark.parametrize("tls", ["smtps", "starttls"])
async def test_passwords_are_sent_encrypted(tls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, trusted = loopback_tls(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    contexts = {"tls": context} if tls == "smtps" else {"start_tls": context}
    async with mail_server(**contexts) as server:
        scheme = "smtps" if tls == "smtps" else "smtp"
        await build_sender(server.port, scheme=scheme, login=f"points%40shop:{PASSWORD}@").send(MESSAGE)

        assert len(server.emails) == 1
        assert server.logins == [(b"points@shop", PASSWORD.encode())]
        assert server.encrypted == [True]


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
async def test_untrusted_certificate_is_unreachable(scheme: str, tmp_path: Path) -> None:
    context, _ = loopback_tls(tmp_path)
    contexts = {"tls": context} if scheme == "smtps" else {"start_tls": context}
    async with mail_server(**contexts) as server:
        with pytest.raises(DeliveryFailedError, match="SSLCertVerificationError") as caught:
            await build_sender(server.port, scheme=scheme, login=f"points:{PASSWORD}@").send(MESSAGE)

        assert server.logins == []
    assert caught.value.kind is FailureKind.UNREACHABLE


async def test_server_without_starttls_gets_no_password() -> None:
    async with mail_server() as server:
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(server.port, login=f"points:{PASSWORD}@").send(MESSAGE)

        assert server.logins == []
    assert caught.value.kind is FailureKind.UNREACHABLE
    assert not has_secrets(caught.value)


async def test_wrong_password_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, trusted = loopback_tls(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    async with mail_server(start_tls=context) as server:
        with pytest.raises(DeliveryFailedError, match="535") as caught:
            await build_sender(server.port, login="points:wrong-secret-of-provider@").send(MESSAGE)

    assert caught.value.kind is FailureKind.REFUSED
    assert not has_secrets(caught.value)


async def test_hanging_server_blocks_neither_the_loop_nor_its_caller() -> None:
    async with mail_server() as server:
        server.at_data = "hang"
        sender = build_sender(server.port)
        began = time.monotonic()
        async with loop_delays() as delay:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(1):
                    await sender.send(MESSAGE)
            assert delay() < LOOP_DELAY_SECONDS_MAX
        assert time.monotonic() - began < 3
        assert not has_secrets(caught.value)
        await until(lambda: server.open == 0)
        server.at_data = ""
        await sender.send(MESSAGE)


async def test_burst_of_messages_keeps_to_the_connection_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "HANDOVER_TIMEOUT_SECONDS", 60.0)
    async with mail_server() as server:
        sender = build_sender(server.port)
        await asyncio.gather(*(sender.send(MESSAGE) for _ in range(100)))
        await until(lambda: server.open == 0)

        assert len(server.emails) == 100
        assert server.max_open <= CONNECTIONS_MAX + 1


async def test_neither_sender_nor_library_logs_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with mail_server() as server:
        caplog.set_level(logging.CRITICAL, "mail.log")
        await build_sender(server.port).send(MESSAGE)

    assert CODE not in caplog.text
    assert "b.private" not in caplog.text
