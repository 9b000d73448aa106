"""Reads one table of settings; whatever is wrong becomes one line."""

import os
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stream_monitor.config.capture import CaptureSettings
from stream_monitor.config.fleet import FleetSettings
from stream_monitor.config.layers import PREFIX, Layered, SettingsError
from stream_monitor.config.listening import AccessSettings
from stream_monitor.config.monitor import MonitorSettings
from stream_monitor.target import TargetError

TABLES: dict[str, type[Layered]] = {
    settings.table: settings for settings in (CaptureSettings, MonitorSettings, FleetSettings)
}


def listed(table: type[Layered]) -> list[tuple[str, FieldInfo]]:
    """The settings of a table as people should read them: its own first, then those of every process that listens."""
    shared = AccessSettings.model_fields
    return sorted(table.model_fields.items(), key=lambda item: item[0] in shared)


S = TypeVar("S", bound=Layered)


def load(table: type[S], **overrides: Any) -> S:
    """Settings of one table; raises SettingsError with one line that names the key and what is valid."""
    _refuse_unknown_variables()
    try:
        found = table(**{key: value for key, value in overrides.items() if value is not None})
        if isinstance(found, CaptureSettings):
            found.monitor()
    except ValidationError as error:
        raise SettingsError(_one_line(table, error)) from None
    except TargetError as error:
        raise SettingsError(
            f"target: {error} (settings target_ca, target_certificate, target_key, target_token_file, target_insecure)"
        ) from None
    return found


def _refuse_unknown_variables() -> None:
    known = {PREFIX + field.upper() for table in TABLES.values() for field in table.model_fields} | {PREFIX + "CONFIG"}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"{name}: no such setting; valid: {', '.join(sorted(known))}")


def _one_line(table: type[Layered], error: ValidationError) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        return f"{key}: no such setting; valid: {', '.join(sorted(table.model_fields))}"
    # What was given for a broker may hold a secret.
    given = "" if key == "nats" else f" (got {first.get('input')!r})"
    return f"{key}: {first['msg']}{given}; {table.model_fields[key].description}"
