"""E-mail by SMTP."""

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
    ANSWER_SECONDS,
    READY_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    Message,
    refused,
    uncertain,
    unreachable,
)
from pointbook_server.provider_settings import MailSender, SmtpServer, StartTls

CONNECTIONS_MAX = 16
QUIT_SECONDS = 0.5
"""How long the server may take to say goodbye, when it has taken the message."""
PROVIDER = "the SMTP server"
_REFUSALS = range(400, 600)
_UNFIT_FOR_HEADERS = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+")
_START_TLS = {StartTls.AUTOMATIC: None, StartTls.REQUIRED: True, StartTls.OFF: False}


class SmtpSender:
    """Sends each message over a connection of its own.

    A connection that is kept is one that the server may close just now, which would turn a definite failure into an
    uncertain one.
    """

    needs_destination = True

    def __init__(self, server: SmtpServer, mail_sender: MailSender) -> None:
        self._server = server
        self._mail_sender = mail_sender
        # The system's certificates, or those that SSL_CERT_FILE names.
        self._tls = ssl.create_default_context()
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)

    async def send(self, message: Message) -> None:
        """Send an e-mail, as `Sender` says."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Try once. The failure is returned, so that it is raised without the library's error behind it."""
        destination = emails.read(message.destination)
        if destination is None:
            return DeliveryFailedError("the destination is no e-mail address")
        address = destination.envelope
        client = self._client()
        handed_over = False
        try:
            content = compose(self._mail_sender, address, message)
            async with asyncio.timeout(READY_SECONDS) as until_ready, self._slots:
                await self._open_envelope(client, address)
                until_ready.reschedule(None)
                handed_over = True
                await client.data(content)
                await _say_goodbye(client)
        except SMTPNotSupported:
            return DeliveryFailedError(f"{PROVIDER} takes no address beyond ASCII")
        except SMTPResponseException as error:
            # Whatever a server answers with 4xx or 5xx, even after the content, it has not taken the message.
            if error.code in _REFUSALS:
                return refused(PROVIDER, error.code)
            return uncertain(PROVIDER, error) if handed_over else unreachable(PROVIDER, error)
        except Exception as error:  # noqa: BLE001 - the moment decides what a failure means, not its type
            return uncertain(PROVIDER, error) if handed_over else unreachable(PROVIDER, error)
        finally:
            client.close()
        return None

    def _client(self) -> SMTP:
        """Make a client for one message. It greets with the domain of our address, which costs no look-up."""
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
            timeout=ANSWER_SECONDS,
        )

    async def _open_envelope(self, client: SMTP, address: str) -> None:
        """Do all that comes before the content: connect, encrypt, log in, and name both ends."""
        encoding, options = ("ascii", []) if address.isascii() else ("utf-8", ["SMTPUTF8"])
        await client.connect()
        if options:
            await _check_smtputf8(client)
        await client.mail(self._mail_sender.address, options=options, encoding=encoding)
        await client.rcpt(address, encoding=encoding)


def compose(mail_sender: MailSender, address: str, message: Message) -> bytes:
    """Write an e-mail in plain text. Its Message-ID is random: it tells nothing, and no two attempts share one."""
    # Seven bits arrive whole by every server, whatever it says of itself.
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
    # By ourselves: the library decodes encoded words in an address (=?utf-8?q?…?=@example.com), line breaks included.
    return f"To: {address}\r\n".encode() + email.as_bytes()


async def _say_goodbye(client: SMTP) -> None:
    """End the session as the protocol wants it. The message is sent by now, whatever becomes of this."""
    with contextlib.suppress(SMTPException, OSError):
        await client.quit(timeout=QUIT_SECONDS)


async def _check_smtputf8(client: SMTP) -> None:
    """Raise SMTPNotSupported where the server takes no address beyond ASCII."""
    if client.is_ehlo_or_helo_needed:
        await client.ehlo()
    if not client.supports_extension("smtputf8"):
        raise SMTPNotSupported("SMTPUTF8")
