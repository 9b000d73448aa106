# vLLM's own image, plus the plug-in. It starts as vLLM's does, and the arguments are vLLM's:
#   docker build -f deploy/docker/engine.Dockerfile -t stream-monitor-engine .
#   docker build -f deploy/docker/engine.Dockerfile --build-arg VLLM_IMAGE=vllm/vllm-openai-cpu:v0.32.0 \
#     -t stream-monitor-engine:cpu .
# STREAM_MONITOR_DISABLE=1 makes it plain vLLM again.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY stream_monitor stream_monitor
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stream-monitor-engine" \
      org.opencontainers.image.description="vLLM with Stream Monitor's capture" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /wheels /wheels
# What the image has is a constraint: only what it lacks is installed, and a clash ends the build instead of vLLM. Where
# its Python is the system's (Ubuntu 24.04), pip has to be told that this is meant.
RUN python3 -m pip list --format=freeze > /wheels/image.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --constraint /wheels/image.txt /wheels/*.whl \
    && rm -r /wheels
ENTRYPOINT ["vllm", "serve", "--worker-cls", "stream_monitor.engine.worker.StreamWorker"]
