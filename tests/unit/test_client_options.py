"""How the client connects: addresses, TLS, the service config and tokens."""

import json
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from pointbook_client import Tls
from pointbook_client.calls import CallDefaults
from pointbook_client.keywords import check_names
from pointbook_client.options import ConnectOptions, connect_settings, is_loopback, service_config
from support.certificates import Authority

ROOT = Path(__file__).parents[2]
TOKEN = "pb_abc.secret"
LOOPBACK = (
    "localhost:50051",
    "LOCALHOST:50051",
    "localhost",
    "127.0.0.1:50051",
    "127.0.0.1",
    "127.8.9.10:1",
    "[::1]:50051",
    "[::1]",
    "unix:/run/pointbook.sock",
    "unix:///run/pointbook.sock",
    "unix-abstract:pointbook",
    "dns:///localhost:50051",
    "dns:localhost:50051",
    "ipv4:127.0.0.1:50051",
    "ipv4:127.0.0.1:1,127.0.0.2:2",
    "ipv6:[::1]:50051",
    "ipv6:[::1]:1,[::1]:2",
)
ELSEWHERE = (
    "points.internal:50051",
    "points.internal",
    "10.0.0.1:50051",
    "0.0.0.0:50051",
    "[2001:db8::1]:50051",
    "localhost.example.com:50051",
    "127.0.0.1.example.com:50051",
    "example.com/127.0.0.1:50051",
    "dns:///points:50051",
    "dns://10.0.0.53/localhost:50051",
    "ipv4:127.0.0.1:1,10.0.0.1:2",
    "ipv6:[::1]:1,[2001:db8::1]:2",
    "xds:///localhost:50051",
    "vsock:2:50051",
)


def settings_of(address: str, tls: Any = None, **options: Any) -> Any:
    """Return the settings of a connection."""
    return connect_settings(address, TOKEN, tls, cast("ConnectOptions", options))


@pytest.mark.parametrize("address", LOOPBACK)
def test_connection_on_this_machine_is_in_plaintext(address: str) -> None:
    assert is_loopback(address)
    assert settings_of(address).credentials is None


@pytest.mark.parametrize("address", ELSEWHERE)
def test_token_leaves_this_machine_only_encrypted(address: str) -> None:
    assert not is_loopback(address)
    assert isinstance(settings_of(address).credentials(), grpc.ChannelCredentials)


@pytest.mark.parametrize("address", ["", "http://points.internal:50051", "https://127.0.0.1:50051", "localhost:1\n"])
def test_address_of_no_server_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="an address is like"):
        settings_of(address)


def test_missing_token_is_none() -> None:
    assert connect_settings("localhost:1", None, None, {}).defaults.token() == ""


def test_plaintext_elsewhere_must_be_asked_for() -> None:
    assert settings_of("points.internal:50051", tls=False).credentials is None


def test_loopback_can_have_tls() -> None:
    assert settings_of("localhost:50051", tls=True).credentials is not None


def test_own_credentials_are_used() -> None:
    credentials = grpc.ssl_channel_credentials()

    assert settings_of("localhost:50051", tls=lambda: credentials).credentials() is credentials


def test_path_in_place_of_tls_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tls must be Tls\("):
        settings_of("localhost:50051", tls="/etc/pointbook/ca.crt")


def test_missing_file_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        settings_of("points.internal:50051", tls=Tls(ca_file=tmp_path / "ca.crt"))


@pytest.mark.parametrize("files", [{"cert_file": "a"}, {"key_file": "a"}])
def test_certificate_without_its_key_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        Tls(**files)


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(Authority().pem)
    current = Tls(ca_file=ca).credentials_source()
    first = current()
    assert current() is first

    ca.write_bytes(Authority().pem)
    second = current()
    ca.unlink()

    assert second is not first
    assert current() is second


def test_certificate_is_not_used_before_its_key_is_renewed(tmp_path: Path) -> None:
    authority = Authority()
    cert, key = authority.issue().write(tmp_path, "client")
    current = Tls(cert_file=cert, key_file=key).credentials_source()
    first, renewed = current(), authority.issue()

    cert.write_bytes(renewed.chain)
    assert current() is first
    key.write_bytes(renewed.key)
    assert current() is not first


@pytest.mark.parametrize("content", [b"", b"no PEM"])
def test_unusable_file_is_found_at_once_and_later_ignored(tmp_path: Path, content: bytes) -> None:
    ca, broken = tmp_path / "ca.crt", tmp_path / "broken.crt"
    broken.write_bytes(content)
    with pytest.raises(OSError, match=r"."):
        Tls(ca_file=broken).credentials_source()

    ca.write_bytes(Authority().pem)
    current = Tls(ca_file=ca).credentials_source()
    first = current()
    ca.write_bytes(content)

    assert current() is first


def test_server_name_is_expected_in_the_certificate(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(Authority().pem)

    options = settings_of("10.0.0.1:1", tls=Tls(ca_file=ca, server_name="points.internal")).channel_options

    assert ("grpc.ssl_target_name_override", "points.internal") in options
    assert not [key for key, _ in settings_of("10.0.0.1:1").channel_options if key == "grpc.ssl_target_name_override"]


def test_service_config_is_the_standard_one_with_all_servers() -> None:
    standard = json.loads((ROOT / "deploy/client/service-config.json").read_text())
    (method,) = standard["methodConfig"]
    expected = {key: value for key, value in method.items() if key != "timeout"}

    config = json.loads(service_config(retries=True, wait_for_ready=True))

    assert config == standard | {"methodConfig": [expected | {"waitForReady": True}]}


def test_retries_and_waiting_can_be_turned_off() -> None:
    (method,) = json.loads(service_config(retries=False, wait_for_ready=False))["methodConfig"]

    assert "retryPolicy" not in method
    assert method["waitForReady"] is False
    # gRPC's transparent retries, of calls that no server has seen, stay on.
    assert "grpc.enable_retries" not in dict(settings_of("localhost:1", retries=False).channel_options)


def test_misspelled_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument: time_out"):
        connect_settings("localhost:1", "", None, {"time_out": 1.0})  # type: ignore[typeddict-unknown-key] # tested


def test_names_of_a_typed_dict_include_inherited_ones() -> None:
    class Child(ConnectOptions, total=False):
        more: int

    check_names({"timeout": 1, "more": 2}, Child)


def test_settings_do_not_show_the_token() -> None:
    settings = settings_of("localhost:1")

    assert settings.defaults.token() == TOKEN
    assert TOKEN not in f"{settings!r}"


@pytest.mark.parametrize(
    ("token", "sent"),
    [
        ("pb_a.b", "Bearer pb_a.b"),
        ("pb_a.b\n", "Bearer pb_a.b"),
        (" pb_a.b\r\n", "Bearer pb_a.b"),
    ],
)
def test_token_of_a_file_is_sent_without_its_line_break(token: str, sent: str) -> None:
    with CallDefaults(1.0, lambda: token).running("/a/B", None) as metadata:
        assert dict(metadata)["authorization"] == sent


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12])
def test_timeout_that_no_call_can_meet_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        settings_of("localhost:1", timeout=timeout)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 1e12])
def test_timeout_of_a_call_that_grpc_takes_for_one_that_has_passed_is_refused(timeout: float) -> None:
    defaults = settings_of("localhost:1").defaults

    with pytest.raises(ValueError, match="at most a day"):
        defaults.timeout(timeout)
    assert [defaults.timeout(own) for own in (None, 0.0, -1.0, 86_400.0)] == [20.0, 0.0, -1.0, 86_400.0]


@pytest.mark.parametrize("token", ["", "\n"])
def test_without_a_token_none_is_sent(token: str) -> None:
    with CallDefaults(1.0, lambda: token).running("/a/B", None) as metadata:
        assert "authorization" not in dict(metadata)


@pytest.mark.parametrize("token", ["pb_a\nb", "pb_ä", "pb_a\x00b"])
def test_token_that_cannot_be_sent_is_not_in_the_error(token: str) -> None:
    with (
        pytest.raises(ValueError, match="characters") as caught,
        CallDefaults(1.0, lambda: token).running("/a/B", None),
    ):
        pass

    assert "pb_" not in str(caught.value)


@pytest.mark.parametrize("token", [None, b"pb_a.b", 5])
def test_token_that_is_no_text_is_named(token: Any) -> None:
    with pytest.raises(TypeError, match="token must be a str"), CallDefaults(1.0, lambda: token).running("/a/B", None):
        pass


def test_own_metadata_come_before_the_defaults() -> None:
    own = [("authorization", "Basic x"), ("x-request-id", "r-1"), ("x-tenant", "t")]

    with CallDefaults(1.0, lambda: TOKEN, request_id="r-0").running("/a/B", own) as metadata:
        assert sorted(metadata) == sorted(own)


def test_each_call_has_a_request_id_that_servers_accept() -> None:
    defaults = CallDefaults(1.0, lambda: "")
    with defaults.running("/a/B", None) as first, defaults.running("/a/B", None) as second:
        ids = [dict(metadata)["x-request-id"] for metadata in (first, second)]

    assert ids[0] != ids[1]
    assert all(isinstance(each, str) and len(each) == 32 for each in ids)
