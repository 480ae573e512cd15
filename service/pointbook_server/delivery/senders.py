"""The choice of one sender for each channel, from the settings."""

from collections.abc import Iterable

from pointbook_common.errors import SettingError
from pointbook_server.delivery.apprise import AppriseSender
from pointbook_server.delivery.http_gateway import HttpGatewaySender
from pointbook_server.delivery.sender import ClosableSender, Sender
from pointbook_server.delivery.smtp import SmtpSender
from pointbook_server.programs.model import Channel
from pointbook_server.settings import ServerSettings


def build_senders(settings: ServerSettings) -> dict[Channel, Sender]:
    """Build the senders that the settings name.

    They belong to the running event loop; each process has its own.

    Raises SettingError, which names every setting without a working sender.
    """
    senders: dict[Channel, Sender] = {}
    problems: list[str] = []
    if (gateway := settings.sms_gateway()) is not None:
        senders[Channel.SMS] = HttpGatewaySender(gateway)
    server, mail_sender = settings.smtp_server(), settings.mail_sender()
    if server is not None and mail_sender is not None:
        senders[Channel.EMAIL] = SmtpSender(server, mail_sender)
    for channel, name, url in (
        (Channel.SMS, "POINTBOOK_APPRISE_SMS_URL", settings.apprise_sms_url),
        (Channel.EMAIL, "POINTBOOK_APPRISE_EMAIL_URL", settings.apprise_email_url),
    ):
        if url is not None:
            try:
                senders[channel] = AppriseSender(name, url.get_secret_value(), channel)
            except SettingError as error:
                problems.append(str(error))
    if problems:
        raise SettingError("; ".join(problems))
    return senders


async def close_senders(senders: Iterable[Sender]) -> None:
    """Close all senders, a sender of several channels once."""
    for sender in {id(sender): sender for sender in senders}.values():
        if isinstance(sender, ClosableSender):
            await sender.aclose()
