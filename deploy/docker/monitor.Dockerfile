# The monitor, a sidecar: no torch, no vLLM, no shell needed, nothing written outside /run and /var/lib.
#   docker build -f deploy/docker/monitor.Dockerfile -t stream-monitor .
# It runs with --read-only, given a writable /run/stream-monitor (a volume shared with the engine) and
# /var/lib/stream-monitor (the store).

# The Python that the test suite runs on.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Of machine code: for every processor of the image's architecture, not for the one that builds it.
ENV NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY stream_monitor stream_monitor
# Bytecode and machine code are compiled here, since nothing can be written where it runs. pip stays outside of what is
# copied on.
RUN python -m venv --without-pip /opt/stream-monitor \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && pip --python /opt/stream-monitor/bin/python install --no-cache-dir --compile "$(echo /wheels/*.whl)[fleet,page,text]" \
    && /opt/stream-monitor/bin/python -c "from stream_monitor import compiled; compiled.prepare()" \
    # Of plotly the page uses one file.
    && find /opt/stream-monitor -path '*/plotly/*' -type f ! -path '*/plotly/__init__.py' \
       ! -path '*/package_data/plotly.min.js' -delete

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stream-monitor" \
      org.opencontainers.image.description="What a reasoning model's chain of thought rests on, while vLLM serves it: the monitor" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# The folders belong to the user: named volumes that are mounted here start as copies of them.
RUN groupadd --gid 65532 monitor \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /var/lib/stream-monitor --shell /usr/sbin/nologin monitor \
    && install -d -m 0770 -o monitor -g monitor /run/stream-monitor /var/lib/stream-monitor
COPY --from=build /opt/stream-monitor /opt/stream-monitor
COPY deploy/docker/healthcheck.py /usr/local/lib/stream-monitor/healthcheck.py
ENV NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= \
    PATH=/opt/stream-monitor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STREAM_MONITOR_INGEST=unix:/run/stream-monitor/ingest.sock \
    STREAM_MONITOR_STORE=/var/lib/stream-monitor/monitor.db

# By number: Kubernetes cannot tell that a named user is not root.
USER 65532:65532
WORKDIR /var/lib/stream-monitor
# 9750: subscribers (gRPC); 9751: metrics, health, the page. Both on loopback unless told otherwise.
EXPOSE 9750 9751
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
    CMD ["python", "/usr/local/lib/stream-monitor/healthcheck.py"]
ENTRYPOINT ["stream-monitor"]
CMD ["serve"]
