"""The real engine with real weights."""
