"""The one exception of tracing."""


class TracingError(ValueError):
    """A trace that cannot be made. The message is one plain line that says what is wrong."""
