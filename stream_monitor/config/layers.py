"""How a setting gets its value: command line over environment over file."""

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "STREAM_MONITOR_"
TABLE_NAMES = ("capture", "monitor", "fleet")
MOST_DAYS = 36_500
"""Of a time that something is kept: a hundred years, which any clock can be put forward by."""


class SettingsError(ValueError):
    """A setting cannot be used. The message is one line that names the key and what would be valid."""


class Layered(BaseSettings):
    """Command line over environment over file.

    Attributes:
        table: the class's table of the file; empty for a part of several.
    """

    table: ClassVar[str] = ""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileTable(settings_cls)


class _FileTable(PydanticBaseSettingsSource):
    """The class's table of the file named by `STREAM_MONITOR_CONFIG`."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # pragma: no cover - unused by us
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(PREFIX + "CONFIG")
        if not path:
            return {}
        try:
            content = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise SettingsError(f"{PREFIX}CONFIG: cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{PREFIX}CONFIG: {path} is not TOML: {error}") from None
        if unknown := sorted(set(content) - set(TABLE_NAMES)):
            raise SettingsError(
                f"{path}: unknown table [{unknown[0]}]; valid: {', '.join(f'[{t}]' for t in TABLE_NAMES)}"
            )
        assert issubclass(self.settings_cls, Layered)
        name = self.settings_cls.table
        table = content.get(name, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: {name} is not a table; write [{name}] on a line of its own")
        return table
