"""Which profile belongs to which engine."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stream_monitor.anchors.panel import Panel
from stream_monitor.anchors.profile import Profile, ProfileError
from stream_monitor.v1alpha1 import summary_pb2

_MOST_MODELS = 256
"""Models whose requests without a profile are counted by name; later ones count as "other"."""


def capture_id(engine: summary_pb2.EngineInfo) -> str:
    """16 hexadecimal digits of what is captured and how: scores of two engines compare where it is equal."""
    watched = (list(engine.layers), list(engine.query_heads), engine.tensor_parallel_size, engine.total_query_heads)
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
        known = model_name in self.missing or len(self.missing) < _MOST_MODELS
        self.missing[model_name if known else "other"] += 1
        return Panel()
