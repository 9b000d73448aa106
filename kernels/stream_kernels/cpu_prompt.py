"""The compiled beam over a prompt on a CPU: `prompt_beam.py` without its intermediate tensors, several times as fast.

It is the search of `cpu.py`, for which the prompt is a cache of one request whose pages are the key blocks: only that
the rows of a query block stand in for more heads of a unit.
"""

import numpy as np
import torch

from stream_kernels.cpu_kernel import BEAM, FLOAT32, Beam, Geometry, Plan, search_query_block
from stream_kernels.cpu_setup import make_beam, make_scratch
from stream_kernels.prompt import Leaves, Prompt
from stream_kernels.statistics import NodeStatistics


class CompiledBeam:
    """The search for one thread at a time: its working memory is its own, keys and nodes are the prompt's."""

    def __init__(self, prompt: Prompt, rows: int) -> None:
        """For query blocks of up to `rows` rows and heads per unit, over a prompt that `takes` accepts."""
        self._prompt = prompt
        config, (kv_heads, blocks, dim, size) = prompt.config, prompt.channels.shape
        self._geometry = Geometry(
            layers=1,
            query_heads=rows,
            head_dim=dim,
            page_size=size,
            token_group=size,
            channel_pack=1,
            key_type=FLOAT32,
            query_type=FLOAT32,
            num_pages=blocks,
            max_context=blocks * size,
            block_size=size,
            top_k=config.top_k,
            sink_blocks=config.sink_blocks,
            recent_blocks=config.recent_blocks,
            strategy=BEAM,
            rerank=int(config.rerank),
            width=config.width * config.top_k,
            rows=1,
        )
        self._plan = _plan(prompt)
        self._pages = np.arange(blocks, dtype=np.int32)
        self._beam = make_beam(self._geometry, kv_heads, rows, config)
        _store_nodes(self._beam, prompt.nodes)
        self._scratch = make_scratch(self._geometry, rows, self._beam.scratch.front.size)
        units, most = len(prompt.kv_head), self._scratch.start.size
        self._ids = np.zeros((units, most), np.int64)
        self._lse = np.zeros((units, rows, most), np.float32)
        self._reads = np.zeros((units, 2), np.int64)

    @staticmethod
    def takes(prompt: Prompt) -> bool:
        """Whether this prompt can be searched here."""
        keys = prompt.channels
        return keys.device.type == "cpu" and keys.dtype == torch.float32

    def search(self, queries: torch.Tensor, rows: int, outside: torch.Tensor, position: int, end: int) -> Leaves:
        """`prompt_beam.search_beam`."""
        unread = np.empty(outside.shape, np.float32)
        search_query_block(
            self._geometry._replace(rows=rows),
            self._plan,
            self._scratch,
            self._beam,
            self._pages,
            queries.contiguous().numpy(),
            outside.contiguous().numpy(),
            self._prompt.profile(end, position).contiguous().numpy(),
            end,
            self._ids,
            self._lse[:, : queries.shape[1]],
            unread,
            self._reads,
        )
        counts, reads = torch.from_numpy(self._reads.copy()).unbind(1)
        most = int(counts.max())
        read = torch.arange(most) < counts[:, None]
        lse = torch.from_numpy(self._lse[:, : queries.shape[1], :most])
        return Leaves(
            ids=torch.from_numpy(self._ids[:, :most].copy()),
            read=read,
            lse=lse.masked_fill(~read[:, None], -torch.inf),
            unread=torch.from_numpy(unread),
            reads=reads.float(),
        )


def _plan(prompt: Prompt) -> Plan:
    """Of one layer whose every unit is what the caller takes it to be."""
    keys, units = prompt.channels, len(prompt.kv_head)
    return Plan(
        unit_kv_head=prompt.kv_head.numpy(),
        unit_first=np.arange(units + 1, dtype=np.int64),
        unit_slots=np.arange(units, dtype=np.int64),
        slot_head=np.arange(units, dtype=np.int64),
        key_address=np.array([keys.data_ptr()], np.int64),
        page_stride=np.array([keys.stride(1)], np.int64),
        head_stride=np.array([keys.stride(0)], np.int64),
        scale=np.ones(1, np.float32),
        softcap=np.array([prompt.softcap], np.float32),
        sinks=np.full((1, units), -np.inf, np.float32),
        table=np.zeros(1, np.int64),
        used_tables=np.zeros(1, np.int64),
        probe_offsets=np.zeros(1, np.int64),
    )


def _store_nodes(beam: Beam, nodes: list[NodeStatistics]) -> None:
    """Writes the prompt's nodes where the compiled search looks for them."""
    offsets = beam.nodes.row_offset
    for level, first in enumerate(offsets[:-1]):
        some = slice(first, first + nodes[level].mean.shape[1])
        for part, vectors in enumerate((nodes[level].mean, *nodes[level].outliers.unbind(2))):
            bits = vectors.to(torch.bfloat16).view(torch.int16).numpy()
            beam.statistics[0, :, part, some] = bits.view(np.uint16)
        beam.summaries.spreads[0, :, some] = nodes[level].spread.numpy()
    beam.scratch.slots[:] = np.arange(len(beam.scratch.slots))
