"""The choice of senders from the settings, and their release at the end."""

from typing import Any

import pytest
from pydantic import ValidationError

from pointbook_common.errors import SettingError
from pointbook_server.delivery.apprise import AppriseSender
from pointbook_server.delivery.console import ConsoleSender
from pointbook_server.delivery.http_gateway import HttpGatewaySender
from pointbook_server.delivery.sender import Message, Sender
from pointbook_server.delivery.senders import build_senders, close_senders
from pointbook_server.delivery.smtp import SmtpSender
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.provider_servers import MESSAGE
from support.servers import server_settings

GATEWAY = {"sms_url": "https://sms.example.com/"}
SMTP = {"smtp_url": "smtps://mail.example.com", "smtp_from": "points@example.com"}
APPRISE_SMS = {"apprise_sms_url": "json://localhost/{to}"}
APPRISE_EMAIL = {"apprise_email_url": "json://localhost/{to}"}

pytestmark = pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, {}),
        (GATEWAY, {Channel.SMS: HttpGatewaySender}),
        (SMTP, {Channel.EMAIL: SmtpSender}),
        (APPRISE_SMS, {Channel.SMS: AppriseSender}),
        (APPRISE_EMAIL, {Channel.EMAIL: AppriseSender}),
        (GATEWAY | SMTP, {Channel.SMS: HttpGatewaySender, Channel.EMAIL: SmtpSender}),
        (GATEWAY | APPRISE_EMAIL, {Channel.SMS: HttpGatewaySender, Channel.EMAIL: AppriseSender}),
        (APPRISE_SMS | SMTP, {Channel.SMS: AppriseSender, Channel.EMAIL: SmtpSender}),
    ],
)
async def test_settings_choose_one_sender_for_each_channel(
    settings: dict[str, Any], chosen: dict[Channel, type]
) -> None:
    senders = build_senders(server_settings(**settings))

    assert {channel: type(sender) for channel, sender in senders.items()} == chosen
    assert all(sender.needs_destination for sender in senders.values())
    await close_senders(senders.values())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (GATEWAY | APPRISE_SMS, ("POINTBOOK_SMS_URL", "apprise_sms_url")),
        (SMTP | APPRISE_EMAIL, ("POINTBOOK_SMTP_URL", "apprise_email_url")),
    ],
)
def test_two_senders_for_one_channel_are_refused(settings: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        server_settings(**settings)

    assert all(name in str(caught.value) for name in names)
    assert "example.com" not in str(caught.value)


def test_every_setting_without_a_working_sender_is_named() -> None:
    settings = {"apprise_sms_url": "nothing://localhost/{to}", "apprise_email_url": "nought://localhost/{to}"}
    with pytest.raises(SettingError) as caught:
        build_senders(server_settings(**settings))

    assert "POINTBOOK_APPRISE_SMS_URL" in str(caught.value)
    assert "POINTBOOK_APPRISE_EMAIL_URL" in str(caught.value)


class CountingSender:
    """A sender that counts how often it is closed."""

    needs_destination = True

    def __init__(self) -> None:
        self.closed = 0

    async def send(self, message: Message) -> None:
        """Send nothing."""

    async def aclose(self) -> None:
        """Count."""
        self.closed += 1


async def test_stopping_server_closes_each_sender_once(database_url: str) -> None:
    shared = CountingSender()
    senders: dict[Channel, Sender] = {Channel.SMS: shared, Channel.EMAIL: shared, Channel.MISSED_CALL: ConsoleSender()}
    server = Server(server_settings(drain_seconds=0.1), database_url, senders=senders)
    await server.start()
    assert shared.closed == 0
    await server.stop()

    assert shared.closed == 1


def test_repr_of_a_message_shows_neither_text_nor_destination() -> None:
    assert repr(MESSAGE) == "Message(challenge_id='challenge-1')"


def test_subject_of_a_message_is_optional() -> None:
    assert Message("+8613812345678", "text", "challenge").subject == ""
