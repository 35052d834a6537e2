"""What a ladder costs before it is made: about how long the encodings take that each level adds."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence

from gguf_moe.encoding import encode
from gguf_moe.plan import Plan

SAMPLE_WEIGHTS = 1 << 18
ROUNDS = 3


def new_encodings(plans: Sequence[Plan]) -> list[Counter[str]]:
    """The weights that are encoded for each plan, by type, beside those that an earlier plan has had encoded."""
    made: set[tuple[str, str]] = set()
    new = []
    for plan in plans:
        weights: Counter[str] = Counter()
        for tensor in plan.tensors:
            if (tensor.info.name, tensor.info.type) not in made:
                made.add((tensor.info.name, tensor.info.type))
                weights[tensor.info.type] += tensor.mapped.elements
        new.append(weights)
    return new


def seconds_of_encoding(plans: Sequence[Plan], threads: int | None = None) -> list[float]:
    """About how long the `new_encodings` of each plan take: a sample of the source's rows is encoded in each type."""
    new = new_encodings(plans)
    speed = {kind: _weights_per_second(plans, kind) for kind in {kind for weights in new for kind in weights}}
    workers = threads or os.cpu_count() or 1
    return [sum(count / speed[kind] for kind, count in weights.items()) / workers for weights in new]


def _weights_per_second(plans: Sequence[Plan], kind: str) -> float:
    """Of one thread, reading included; the best of a few rounds on the largest tensor of the type."""
    candidates = [tensor.mapped for plan in plans for tensor in plan.tensors if tensor.info.type == kind]
    slab = max(candidates, key=lambda mapped: mapped.elements).slabs[0]
    rows = min(slab.rows, max(1, SAMPLE_WEIGHTS // slab.source.columns))
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        encode(slab, 0, rows, [kind])
        seconds.append(time.perf_counter() - started)
    return rows * slab.source.columns / min(seconds)
