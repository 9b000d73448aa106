"""Which profile belongs to which engine."""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stream_monitor.anchors.panel import Panel
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.v1alpha1 import summary_pb2

_LOG = logging.getLogger(__name__)
_MOST_MODELS = 256
"""Models whose requests without a profile are counted by name; later ones count as "other"."""


def capture_id(engine: summary_pb2.EngineInfo) -> str:
    """16 hexadecimal digits of what is captured and how: scores of two engines compare where it is equal.

    A pipeline rank knows its own layers alone, so there the number of ranks stands for all of them.
    """
    pipeline = engine.pipeline_parallel_size
    layers = list(engine.layers) if pipeline == 1 else f"pipeline of {pipeline}"
    watched = (layers, list(engine.query_heads), engine.tensor_parallel_size, engine.total_query_heads)
    shape = engine.geometry.SerializeToString(deterministic=True)
    return hashlib.sha256(f"{engine.model_name}{watched}".encode() + shape).hexdigest()[:16]


@dataclass
class Calibration:
    """The profiles that the monitor was given.

    Attributes:
        profiles: all of them.
        rate: share of requests without cause that may raise any finding.
        missing: model to its requests that no profile fits.
    """

    profiles: tuple[Profile, ...] = ()
    rate: float = 0.01
    missing: Counter[str] = field(default_factory=Counter)
    _warned: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def read(cls, paths: str, rate: float) -> "Calibration":
        """Profiles from files, separated by commas. Raises ProfileError."""
        profiles = tuple(Profile.read(Path(path.strip())) for path in paths.split(",") if path.strip())
        known: dict[tuple[str, str], Profile] = {}
        for profile in profiles:
            profile.check(rate)
            if known.setdefault((profile.model_name, profile.capture), profile) is not profile:
                raise ProfileError(f"two profiles are of {profile.model_name}, captured alike; name one of them")
        return cls(profiles, rate)

    def panel(self, model_name: str, capture: str) -> Panel:
        """The detectors of a request, calibrated where there is a profile for it."""
        for profile in self.profiles:
            if (profile.model_name, profile.capture) == (model_name, capture):
                return Panel(profile, self.rate)
        self._warn(model_name, capture)
        known = model_name in self.missing or len(self.missing) < _MOST_MODELS
        self.missing[model_name if known else "other"] += 1
        return Panel()

    def _warn(self, model_name: str, capture: str) -> None:
        """Once for each model and capture that profiles were given for in vain."""
        if not self.profiles or (model_name, capture) in self._warned or len(self._warned) >= _MOST_MODELS:
            return
        self._warned.add((model_name, capture))
        have = ", ".join(f"{profile.model_name} (capture {profile.capture})" for profile in self.profiles)
        _LOG.warning(
            "no profile fits %s, capture %s: its findings have no p-values and no known rate. Profiles are of %s; a "
            "profile holds for one model, captured one way. Make one with `stream-monitor calibrate`",
            model_name,
            capture,
            have,
        )
