"""The part of the capture's settings that the search is given."""

from stream_kernels.search import SearchConfig
from stream_monitor.config import CaptureSettings


def search_config(settings: CaptureSettings) -> SearchConfig:
    """Settings that are not named here are the search's own defaults."""
    return SearchConfig(
        strategy=settings.strategy,
        block_size=settings.block_size,
        top_k=settings.top_k,
        sink_blocks=settings.sink_blocks,
        recent_blocks=settings.recent_blocks,
        min_gain=settings.min_gain,
    )
