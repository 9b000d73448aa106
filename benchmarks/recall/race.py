"""Every method and setting on one text: what it keeps, and what it reads for that."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.attention import Attention, of_text
from benchmarks.recall.peers import SHARINGS, flat_scores, published, shared
from benchmarks.recall.points import BEAM, DEFAULT, ORACLE, Case, Measured
from benchmarks.recall.product import Product, unobserved_share
from benchmarks.recall.truth import Judge, Truth
from stream_kernels.search import SearchConfig

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 32, 60, 64, 128, 256)
"""Candidates per block kept, of every method that re-ranks; 256 is the most the product takes."""

NARROW_BOXES = (2, 4, 8, 16, 32)
"""Values of `box_width` for the smallest budgets, where summaries cost as much as blocks."""

OUTLIER_SHARES = (0.0, 0.5, 1.0)

GAINS = (1e-2, 3e-3, 1e-3, 5e-4, 2e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)

SPREAD_WEIGHTS = (1.5, 2.0, 4.0)
"""Beside 1, where many candidates are read."""

_SWEPT = ("width", "min_gain", "box_width", "outlier_share", "outlier_keys", "spread_weight")


def measure(model: Path, kind: str, wanted: int, ids: list[int], top_ks: Sequence[int]) -> Case:
    """The case of one text `ids` of a kind, `wanted` tokens long, through a model, on one thread."""
    torch.set_num_threads(1)
    attention = of_text(model, ids)
    with torch.inference_mode():
        points = list(race(attention, top_ks))
    return Case(model.name, wanted, kind, attention.tokens, attention.group, points)


def race(attention: Attention, top_ks: Sequence[int]) -> Iterator[Measured]:
    """Runs them all with each of `top_ks` blocks kept and the product's default blocks forced."""
    config = SearchConfig(strategy="beam")
    truth = Truth.of(attention, config)
    flat = flat_scores(attention, truth, config)
    product = Product(attention)
    for top_k in top_ks:
        config = replace(config, top_k=top_k)
        judge = Judge(truth, top_k)
        for method, setting, own in _product_settings(config):
            summary, reads = product.run(own)
            figures = judge.figures(torch.from_numpy(summary.block_ids).long(), unobserved_share(summary))
            yield Measured(method, setting, top_k, reads, figures)
        for name, scores in flat.items():
            ids, reads = published(scores, truth, config)
            yield Measured(f"{name}, published", "", top_k, reads, judge.figures(ids))
            for width in WIDTHS:
                for sharing, share in SHARINGS.items():
                    ids, reads = shared(scores, truth, config, attention.group, width, share)
                    setting = f"width {width}, {sharing} over heads"
                    yield Measured(f"{name}, shared", setting, top_k, reads, judge.figures(ids))


def _product_settings(config: SearchConfig) -> Iterator[tuple[str, str, SearchConfig]]:
    """(method, setting, parameters) of every run of the product."""
    yield BEAM, DEFAULT, config
    wide = replace(config, width=max(WIDTHS))
    swept = [replace(wide, min_gain=gain, outlier_share=share) for share in OUTLIER_SHARES for gain in GAINS]
    fixed = [(width, share) for width in WIDTHS for share in ((0.25, 0.5, 1.0) if width > 3 else OUTLIER_SHARES)]
    swept += [replace(config, width=width, min_gain=0.0, outlier_share=share) for width, share in fixed]
    two = [replace(wide, min_gain=gain, outlier_share=share) for share in (0.5, 1.0) for gain in GAINS if gain < 5e-4]
    bare, full = (
        [replace(config, width=width, min_gain=0.0, outlier_share=share) for width in WIDTHS if width > 3]
        for share in (0.0, 1.0)
    )
    swept += [replace(own, outlier_keys=2) for own in two + full]
    swept += [replace(own, outlier_keys=3) for own in full]
    swept += [replace(own, spread_weight=weight) for own in bare + full for weight in SPREAD_WEIGHTS]
    for box in NARROW_BOXES:
        narrow = replace(config, box_width=box, outlier_share=0.0)
        swept += [replace(narrow, width=width, min_gain=0.0) for width in (1, 2, 3)]
        swept += [replace(narrow, width=max(WIDTHS), min_gain=gain) for gain in (0.003, 0.001)]
    for own in swept:
        parts = [f"{name} {getattr(own, name):g}" for name in _SWEPT]
        yield BEAM, ", ".join(parts), own
    for probes in (1, 4, config.block_size):
        plain = replace(SearchConfig.paper(config.top_k), probe_keys=probes)
        yield f"descent r={probes}, published", "", plain
    for probes in (1, 4):
        for width in WIDTHS:
            yield (
                f"descent r={probes}, shared",
                f"width {width}",
                replace(config, strategy="descent", probe_keys=probes, width=width),
            )
    yield ORACLE, "", replace(config, strategy="exact")
