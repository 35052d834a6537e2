"""The codes inside blocks, apart from the scales: what they stand for, and how others are put in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import iquants, kquants, legacy
from .formats import Format
from .weighted import TABLE


@dataclass(frozen=True)
class Coding:
    """levels: what code q stands for before step and offset, float32 [codes], rising. put(records [blocks], q uint8
    [blocks, block length]) sets the codes."""

    levels: np.ndarray
    put: Callable[[np.ndarray, np.ndarray], None]


def _even(count: int, put: Callable[[np.ndarray, np.ndarray], None]) -> Coding:
    return Coding(np.arange(count, dtype=np.float32), put)


CODES: dict[str, Coding] = {
    "Q8_0": _even(255, legacy.put_q8_0),
    "Q4_0": _even(16, legacy.put),
    "Q4_1": _even(16, legacy.put),
    "Q5_0": _even(32, legacy.put),
    "Q5_1": _even(32, legacy.put),
    "Q2_K": _even(4, kquants.put_q2_k),
    "Q3_K": _even(8, kquants.put_q3_k),
    "Q4_K": _even(16, kquants.put_q45_k),
    "Q5_K": _even(32, kquants.put_q45_k),
    "Q6_K": _even(64, kquants.put_q6_k),
    "IQ4_NL": Coding(TABLE, iquants.put),
    "IQ4_XS": Coding(TABLE, iquants.put),
}


def find(form: Format) -> Coding:
    """The coding of a format. ValueError for one of single weights."""
    if form.name not in CODES:
        raise ValueError(f"{form.name} has no codes; expected one of {', '.join(CODES)}")
    return CODES[form.name]
