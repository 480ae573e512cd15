"""Secrets from files: POINTBOOK_X_FILE names a file with the value of POINTBOOK_X."""

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
"""More than all keys and secrets need together; larger files are mistakes, such as a log."""


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A file with the value of a setting."""

    variable: str
    path: str
    is_duplicate: bool
    """Whether the setting itself is set as well."""

    def read(self) -> str:
        """Return the file's text without a trailing line break.

        Raises ValueError, which never quotes the file.
        """
        if self.is_duplicate:
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
    """The settings source of POINTBOOK_X_FILE variables, as SecretFile values."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return a field's file and key, and that its value is not JSON."""
        variables = {name.upper(): value for name, value in os.environ.items()}
        variable = f"{self.config['env_prefix']}{field_name}".upper()
        path = variables.get(variable + FILE_SUFFIX)
        if not path or not is_secret(field):
            return None, field_name, False
        return SecretFile(variable + FILE_SUFFIX, path, is_duplicate=bool(variables.get(variable))), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the files by field."""
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: file for name, file in found.items() if file is not None}


class SecretFileSettings(BaseSettings):
    """Settings whose secrets can come from files.

    A subclass must end with `_read_secret_file = field_validator("*", mode="before")(read_secret_file)`: "before"
    validators run in reverse order, so the last one runs first.
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
        """Return the sources: arguments first, then files, then variables."""
        del dotenv_settings, file_secret_settings
        return init_settings, SecretFilesSource(settings_cls), env_settings


def read_secret_file(value: object) -> object:
    """Return the text of a SecretFile, and any other value unchanged.

    Raises ValueError.
    """
    return value.read() if isinstance(value, SecretFile) else value


def is_secret(field: FieldInfo) -> bool:
    """Return whether a setting contains a secret."""
    return _has_secret(field.annotation)


def secret_file_fields(settings: type[BaseSettings]) -> list[str]:
    """Return the names of the fields whose value can come from a file."""
    return [name for name, field in settings.model_fields.items() if is_secret(field)]


def _has_secret(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(map(is_secret, annotation.model_fields.values()))
    return annotation is SecretStr or any(_has_secret(argument) for argument in get_args(annotation))
