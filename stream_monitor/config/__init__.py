"""Every setting of the product, its default and its meaning, in one place.

Values come, strongest first, from the command line, `STREAM_MONITOR_*` variables, and the TOML file that
`STREAM_MONITOR_CONFIG` names (tables `[capture]`, `[monitor]` and `[fleet]`). They are parsed once, at the edge; inner
code takes values, not settings objects.
"""

from stream_monitor.config.capture import CaptureSettings as CaptureSettings
from stream_monitor.config.fleet import FleetSettings as FleetSettings
from stream_monitor.config.layers import PREFIX as PREFIX
from stream_monitor.config.layers import SettingsError as SettingsError
from stream_monitor.config.listening import AccessSettings as AccessSettings
from stream_monitor.config.loading import TABLES as TABLES
from stream_monitor.config.loading import listed as listed
from stream_monitor.config.loading import load as load
from stream_monitor.config.monitor import MonitorSettings as MonitorSettings
from stream_monitor.config.stream import OnStream as OnStream
