"""The error of settings, which the server, the shim and the command share."""


class SettingError(Exception):
    """A setting that turns out to be wrong only when it is used; the message is one line that names the setting."""
