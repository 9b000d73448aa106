"""Runs inside vLLM: plug-in entry point, capture plan, attention backends, runner hooks, the capture itself.

vLLM calls `register` through its `vllm.general_plugins` entry point in every one of its processes, some more than once.
"""


def register() -> None:
    """Register our attention backends over the native members they subclass.

    Starts no thread, opens no socket, imports neither torch nor grpc; safe to call again. Classes are given by path, so
    vLLM imports them only if it selects that backend. A fault here must not stop the engine: it is logged, and the
    plan later refuses the layers that did not get our backend.
    """
    import logging

    log = logging.getLogger("vllm.stream_monitor")
    try:
        from stream_monitor.engine.policy import disabled

        if disabled():
            return
        from stream_monitor.engine.compat.engine import register_backends
        from stream_monitor.engine.compat.parallel import mark_start

        mark_start()
        register_backends()
    except Exception as error:
        log.warning("Stream Monitor: attention backends not registered, nothing will be captured: %s", error)
