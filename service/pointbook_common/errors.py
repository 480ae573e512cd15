"""The error of settings, which the server, the shim and the command share."""


class SettingError(Exception):
    """A setting that turns out to be invalid only when it is used.

    The message is one line that names the setting.
    """
