"""Model runner V1, of every CPU engine and of GPU engines that ask for it (v1/worker/gpu_model_runner.py, 0.32.0)."""

from typing import Any

from stream_monitor.engine.compat.runner import BatchRows, DeviceInputs


class RunnerV1:
    """Reads the runner's persistent batch (v1/worker/gpu_input_batch.py, v1/worker/block_table.py)."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def block_tokens(self) -> list[int]:
        """Tokens per block, per KV cache group.

        Raises:
            ValueError: the kernels split the scheduler's blocks (v1/worker/utils.py:460), so that their ids differ.
        """
        tokens = [group.kv_cache_spec.block_size for group in self._runner.kv_cache_config.kv_cache_groups]
        if tokens != [table.block_size for table in self._tables()]:
            raise ValueError("the attention kernels split the scheduler's KV blocks")
        return tokens

    def table_pages(self) -> list[int]:
        """Most pages of a request, per KV cache group."""
        return [table.block_table.np.shape[1] for table in self._tables()]

    def batch(self) -> BatchRows:
        """The batch of the step that has just run; its tables are views of the runner's own."""
        tables = self._tables()
        return BatchRows(
            request_ids=list(self._runner.input_batch.req_ids),
            block_tables=[table.block_table.np for table in tables],
            page_tokens=[table.block_size for table in tables],
        )

    def query_start_loc(self) -> Any:
        """int32 [requests + 1] on the device, one for the runner's life; exists as soon as the runner does."""
        return self._runner.query_start_loc.gpu

    def device_inputs(self) -> DeviceInputs:
        """The runner's inputs on the device, one copy for its life; after the KV cache was set up."""
        return DeviceInputs(
            seq_lens=self._runner.seq_lens,
            block_tables=[table.block_table.gpu for table in self._tables()],
        )

    def _tables(self) -> Any:
        return self._runner.input_batch.block_table.block_tables
