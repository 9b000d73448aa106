"""Model runner V2, the default of GPU engines (v1/worker/gpu/model_runner.py, 0.26.0 and 0.32.0)."""

from typing import Any

from stream_monitor.engine.compat.runner import BatchRows, DeviceInputs


class RunnerV2:
    """Reads the runner's persistent inputs, and the state that it keeps between `execute_model` and `sample_tokens`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def block_tokens(self) -> list[int]:
        """Tokens per block, per KV cache group.

        Raises:
            ValueError: the kernels split the scheduler's blocks, so that their ids differ.
        """
        tokens = [group.kv_cache_spec.block_size for group in self._runner.kv_cache_config.kv_cache_groups]
        if tokens != list(self._runner.kernel_block_sizes[: len(tokens)]):
            raise ValueError(
                f"the attention kernels split the scheduler's KV blocks of {tokens} tokens into "
                f"{list(self._runner.kernel_block_sizes)}"
            )
        return tokens

    def table_pages(self) -> list[int]:
        """Most pages of a request, per KV cache group."""
        return [table.shape[1] for table in self._runner.block_tables.input_block_tables]

    def batch(self) -> BatchRows:
        """The batch of the step that has just run (`execute_model_state`, set on every pipeline rank). Its tables are
        on the device alone."""
        return BatchRows(list(self._runner.execute_model_state.input_batch.req_ids), [], [])

    def query_start_loc(self) -> Any:
        """int32 [requests + 1] on the device, one for the runner's life; exists as soon as the runner does."""
        return self._runner.input_buffers.query_start_loc

    def device_inputs(self) -> DeviceInputs:
        """The runner's inputs on the device, one copy for its life; after the KV cache was set up."""
        return DeviceInputs(
            seq_lens=self._runner.input_buffers.seq_lens,
            block_tables=list(self._runner.block_tables.input_block_tables),
        )
