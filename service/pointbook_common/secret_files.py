"""Secrets from files: a secret setting POINTBOOK_X may be given as POINTBOOK_X_FILE, which names a file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from pointbook_common.regular_files import read_regular_file

FILE_SUFFIX = "_FILE"
FILE_BYTES_MAX = 64 * 1024
"""More than all keys and secrets together need: a path to a device or a log is a mistake."""


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A file that holds the value of a setting."""

    variable: str
    path: str
    is_second: bool
    """Whether the setting is given directly as well."""

    def read(self) -> str:
        """Return the file's text without its last line break. Raises ValueError, which never quotes the file."""
        if self.is_second:
            raise ValueError(f"is set twice: remove it or {self.variable}")
        try:
            text = read_regular_file(Path(self.path), FILE_BYTES_MAX).decode()
        except OSError as error:
            raise ValueError(f"the file of {self.variable} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"the file of {self.variable} is not UTF-8 text") from None
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise ValueError(f"the file of {self.variable} is empty")
        return text


class SecretFilesSource(PydanticBaseSettingsSource):
    """The settings source of POINTBOOK_X_FILE variables: it returns a SecretFile for each that is set."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the file of a field, its key, and that its text is no JSON."""
        given = {name.upper(): value for name, value in os.environ.items()}
        direct = f"{self.config['env_prefix']}{field_name}".upper()
        path = given.get(direct + FILE_SUFFIX)
        if not path or not is_secret(field):
            return None, field_name, False
        return SecretFile(direct + FILE_SUFFIX, path, is_second=bool(given.get(direct))), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the files by the fields that they are for."""
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: file for name, file in found.items() if file is not None}


class SecretFileSettings(BaseSettings):
    """Settings whose secrets may come from files.

    A class of them ends with `_read_secret_file = field_validator("*", mode="before")(read_secret_file)`: validators
    run in reverse order before a value is parsed, so that the last one is the first to see it.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments first, then files, then variables."""
        del dotenv_settings, file_secret_settings
        return init_settings, SecretFilesSource(settings_cls), env_settings


def read_secret_file(value: object) -> object:
    """Return the text of a SecretFile, and any other value unchanged. Raises ValueError."""
    return value.read() if isinstance(value, SecretFile) else value


def is_secret(field: FieldInfo) -> bool:
    """Return whether a setting holds a secret, or several."""
    return _has_secret(field.annotation)


def secret_file_fields(settings: type[BaseSettings]) -> list[str]:
    """Return the names of the fields whose value may come from a file."""
    return [name for name, field in settings.model_fields.items() if is_secret(field)]


def _has_secret(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(map(is_secret, annotation.model_fields.values()))
    return annotation is SecretStr or any(_has_secret(argument) for argument in get_args(annotation))
