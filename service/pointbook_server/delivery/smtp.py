"""E-mail by an SMTP server."""

import asyncio
import contextlib
import re
import secrets
import ssl
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.policy import SMTPUTF8 as SMTPUTF8_POLICY

from aiosmtplib import SMTP, SMTPException, SMTPNotSupported, SMTPResponseException

from pointbook_server.customers import emails
from pointbook_server.delivery.sender import (
    HANDOVER_TIMEOUT_SECONDS,
    RESPONSE_TIMEOUT_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    Message,
    refused_error,
    uncertain_error,
    unreachable_error,
)
from pointbook_server.provider_settings import MailSender, SmtpServer, StartTls

CONNECTIONS_MAX = 16
QUIT_TIMEOUT_SECONDS = 0.5
"""The time within which the server may answer QUIT after it has accepted the message."""
PROVIDER = "the SMTP server"
_REFUSAL_CODES = range(400, 600)
_UNFIT_FOR_HEADERS = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+")
_START_TLS = {StartTls.AUTOMATIC: None, StartTls.REQUIRED: True, StartTls.OFF: False}


class SmtpSender:
    """A sender that uses a new connection for each message.

    The server may close a reused connection at any moment, which would turn a definite failure into an uncertain one.
    """

    needs_destination = True

    def __init__(self, server: SmtpServer, mail_sender: MailSender) -> None:
        self._server = server
        self._mail_sender = mail_sender
        # Trusts the system's certificates, or those in SSL_CERT_FILE.
        self._tls = ssl.create_default_context()
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)

    async def send(self, message: Message) -> None:
        """Send an e-mail. Raises the errors of `Sender.send`."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Make one attempt, and return its failure.

        It is raised later, so that the library's error is not its cause.
        """
        destination = emails.read(message.destination)
        if destination is None:
            return DeliveryFailedError("the destination is not an e-mail address")
        address = destination.envelope
        client = self._build_client()
        handed_over = False
        try:
            content = compose(self._mail_sender, address, message)
            async with asyncio.timeout(HANDOVER_TIMEOUT_SECONDS) as handover_timeout, self._slots:
                await self._start_mail(client, address)
                handover_timeout.reschedule(None)
                handed_over = True
                await client.data(content)
                await _quit(client)
        except SMTPNotSupported:
            return DeliveryFailedError(f"{PROVIDER} accepts no addresses beyond ASCII")
        except SMTPResponseException as error:
            # A server that answers with 4xx or 5xx, even after the content, has not accepted the message.
            if error.code in _REFUSAL_CODES:
                return refused_error(PROVIDER, error.code)
            return uncertain_error(PROVIDER, error) if handed_over else unreachable_error(PROVIDER, error)
        except Exception as error:  # noqa: BLE001 - the time of a failure decides what it means, not its type
            return uncertain_error(PROVIDER, error) if handed_over else unreachable_error(PROVIDER, error)
        finally:
            client.close()
        return None

    def _build_client(self) -> SMTP:
        """Build a client for one message.

        Its EHLO names the domain of our address, which costs no look-up.
        """
        server = self._server
        return SMTP(
            hostname=server.host,
            port=server.port,
            username=server.user or None,
            password=server.password or None,
            use_tls=server.tls,
            start_tls=_START_TLS[server.start_tls],
            tls_context=self._tls,
            local_hostname=self._mail_sender.domain,
            timeout=RESPONSE_TIMEOUT_SECONDS,
        )

    async def _start_mail(self, client: SMTP, address: str) -> None:
        """Run the commands before the content: connect, encrypt, log in, MAIL and RCPT."""
        encoding, options = ("ascii", []) if address.isascii() else ("utf-8", ["SMTPUTF8"])
        await client.connect()
        if options:
            await _check_smtputf8(client)
        await client.mail(self._mail_sender.address, options=options, encoding=encoding)
        await client.rcpt(address, encoding=encoding)


def compose(mail_sender: MailSender, address: str, message: Message) -> bytes:
    """Build an e-mail in plain text.

    Its Message-ID is random, so it reveals nothing and is new for each attempt.
    """
    # Seven bits pass unchanged through every server, even one that claims 8BITMIME.
    policy = (SMTP_POLICY if address.isascii() else SMTPUTF8_POLICY).clone(cte_type="7bit")
    email = EmailMessage(policy)
    email["From"] = Address(mail_sender.display_name, addr_spec=mail_sender.address)
    subject = _UNFIT_FOR_HEADERS.sub(" ", message.subject).strip()
    if subject:
        email["Subject"] = subject
    email["Date"] = datetime.now(UTC)
    email["Message-ID"] = f"<{secrets.token_hex(16)}@{mail_sender.domain}>"
    email["Auto-Submitted"] = "auto-generated"
    email.set_content(message.text)
    # Not by the library: it decodes encoded words in an address (=?utf-8?q?…?=@example.com), including line breaks.
    return f"To: {address}\r\n".encode() + email.as_bytes()


async def _quit(client: SMTP) -> None:
    """End the session politely. The message is sent already, so errors do not matter."""
    with contextlib.suppress(SMTPException, OSError):
        await client.quit(timeout=QUIT_TIMEOUT_SECONDS)


async def _check_smtputf8(client: SMTP) -> None:
    """Raise SMTPNotSupported if the server accepts no addresses beyond ASCII."""
    if client.is_ehlo_or_helo_needed:
        await client.ehlo()
    if not client.supports_extension("smtputf8"):
        raise SMTPNotSupported("SMTPUTF8")
