"""Settings of the plug-in, inside vLLM."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from stream_monitor.addresses import check_address
from stream_monitor.config.layers import Layered
from stream_monitor.config.places import default_target
from stream_monitor.target import Target
from stream_monitor.tenants import check_tenant

LEAST_PROMPT_STRIDE = 16
"""Rows of prompts take memory for each stretch of so many tokens of a step."""


def _whole(value: object) -> object:
    """A number as a variable has it, as text: a `Literal` takes no text for a number."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class CaptureSettings(Layered):
    """What the plug-in captures inside the engine. The defaults are the table every published figure uses."""

    table = "capture"

    disable: bool = Field(False, description="1 makes the plug-in a no-op.")
    target: str = Field(
        default_factory=default_target,
        description="Address of the monitor: unix:/path or host:port. Beyond loopback it needs `target_ca`.",
    )
    target_ca: str = Field(
        "", description="File of the CAs by one of which the monitor's certificate is signed, or `system`: speak TLS."
    )
    target_certificate: str = Field("", description="File of the certificate that is shown to the monitor (mTLS).")
    target_key: str = Field("", description="File of its key.")
    target_token_file: str = Field(
        "", description="File of the bearer token that is shown to the monitor; read again for each connection."
    )
    target_insecure: bool = Field(False, description="Publish beyond loopback without TLS.")
    tenant: str = Field("", description="Tenant of all requests of this engine.")
    tenant_argument: str = Field(
        "",
        description="Name of the entry of `vllm_xargs` in which the gateway in front of vLLM says whose request it is. "
        "The gateway must set it in every request, over what the client sent.",
    )
    stride: int = Field(4, ge=1, le=4096, description="Capture one row in every `stride` positions of a request.")
    prompt_stride: int = Field(
        0,
        ge=0,
        le=4096,
        description="Capture one row in every `prompt_stride` positions of each prompt too as it is read, 64 of a "
        "chunk at most, counted back from the chunk's last row, which is always captured; 16 or more. 0: that row "
        "alone. What the prefix cache knows is not read again.",
    )
    layers: str = Field(
        "auto",
        description="Layers to watch: auto, all, or a list such as 8,12,20-23. auto picks layers evenly over the upper "
        "two thirds of the model, as many as max_heads allows, at most 4.",
    )
    heads: str = Field("auto", description="Query heads to watch in each layer of a rank: auto, all, or a list.")
    max_heads: int = Field(32, ge=1, le=4096, description="Watched (layer, head) pairs per rank under auto.")
    strategy: Literal["beam", "descent", "exact"] = Field(
        "beam",
        description="How key blocks are searched: beam by summaries of the blocks, which take about 1/32 of the "
        "watched layers' KV cache; descent without, reading more of the keys; exact reads all of them.",
    )
    block_size: Annotated[Literal[8, 16, 32, 64, 128], BeforeValidator(_whole)] = Field(
        32, description="Tokens per key block."
    )
    top_k: int = Field(8, ge=1, le=4096, description="Key blocks kept per query head.")
    min_gain: float = Field(
        0.0005,
        ge=0,
        le=1,
        description="Under beam, a search reads on while the heads that share its reads expect to gain this part of "
        "their attention, summed, per block read. Less reads more and finds more; 0 reads 16 blocks per block kept.",
    )
    sink_blocks: int = Field(1, ge=0, le=16, description="First blocks, always kept.")
    recent_blocks: int = Field(2, ge=1, le=64, description="Last blocks, always kept.")
    max_requests: int = Field(
        256, ge=1, le=4096, description="Requests captured at a time; others are refused, counted."
    )
    audit_every: int = Field(
        64, ge=0, description="Recompute one (layer, head, row) exactly every so many captured steps; 0: never."
    )
    # A step is divided into messages of 2 MiB (engine/splitting.py).
    ring_bytes: int = Field(16 << 20, ge=1 << 22, le=1 << 32, description="Size of the shared-memory ring.")
    queue_steps: int = Field(
        4, ge=1, le=64, description="Captured steps that may wait for the estimator; more are dropped, counted."
    )
    max_overhead: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Part of the engine's time that capture may take on its runner thread, and the search where it has "
        "no CPU of its own. Above it the stride is doubled, to 64 times at most, and halved when there is room again; "
        "0: never.",
    )
    gpu_share: float = Field(
        0.125, gt=0, le=1, description="Part of a GPU's multiprocessors that a search may occupy beside the engine."
    )
    send_token_ids: bool = Field(
        False,
        description="Let token ids, and so text, leave the engine: those of the output, and of prompts up to 131,072 "
        "tokens.",
    )
    client_may_disable: bool = Field(
        False, description="Let a request switch its own monitoring off, by stream_monitor_disable in its vllm_xargs."
    )
    allow_untested_engine: bool = Field(
        False, description="Capture on a vLLM version this release was not tested with."
    )

    @field_validator("prompt_stride")
    @classmethod
    def _prompt_stride(cls, value: int) -> int:
        if 0 < value < LEAST_PROMPT_STRIDE:
            raise ValueError(f"must be 0 or from {LEAST_PROMPT_STRIDE} to 4096")
        return value

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return check_address(value)

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, value: str) -> str:
        return check_tenant(value)

    def monitor(self) -> Target:
        """Where to publish, and how. Raises TargetError if the settings of `target` do not go together."""
        return Target(
            self.target,
            self.target_ca,
            self.target_certificate,
            self.target_key,
            self.target_token_file,
            self.target_insecure,
        )
