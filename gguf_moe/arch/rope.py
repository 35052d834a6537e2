"""Rotary position embedding: what a config asks for, the keys and the tensor that llama.cpp reads of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np

from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError

KINDS = ("default", "linear", "yarn", "llama3", "longrope", "su", "dynamic")
_FACTORS = ("extrapolation_factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow")  # of YaRN, optional


@dataclass(frozen=True)
class Rope:
    """Rotary base and scaling; `values` has the numbers that its kind takes, by their names in config.json."""

    theta: float
    kind: str
    values: dict[str, float]

    def add_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add the scaling's keys and the base, in the order of llama.cpp's converter."""
        value = self.values.get
        if self.kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(self.values["factor"])
        elif self.kind in ("longrope", "su"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        if self.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(self.values["original_max_position_embeddings"]))
            for number, add in (
                (value("extrapolation_factor"), writer.add_rope_scaling_yarn_ext_factor),
                (value("attention_factor", value("attn_factor")), writer.add_rope_scaling_yarn_attn_factor),
                (value("beta_fast"), writer.add_rope_scaling_yarn_beta_fast),
                (value("beta_slow"), writer.add_rope_scaling_yarn_beta_slow),
            ):
                if number is not None:
                    add(number)
        writer.add_rope_freq_base(self.theta)

    def frequency_divisors(self, head_size: int) -> np.ndarray | None:
        """The tensor rope_freqs.weight, float32 [head_size / 2], by which llama.cpp divides frequencies; None without.

        llama3 scaling leaves short waves as they are, divides long ones by its factor and blends those between.
        Each step is rounded to float32 as in llama.cpp's converter, which computes with torch: there a number over a
        tensor is the number times the reciprocal.
        """
        if self.kind != "llama3":
            return None
        factor, low, high, context = (
            self.values[name]
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        float32, one = np.float32, np.float32(1)
        exponents = (np.arange(0, head_size, 2, dtype=float32) / float32(head_size)).astype(np.float64)
        with np.errstate(all="ignore"):  # absurd factors give infinities, which conversion refuses like any other
            frequencies = one / np.power(float(float32(self.theta)), exponents).astype(float32)
            wavelengths = one / frequencies * float32(2 * math.pi)
            blend = (one / wavelengths * float32(context) - float32(low)) / float32(high - low)
            between = one / ((one - blend) / float32(factor) + blend)
            long, short = wavelengths > float32(context / low), wavelengths < float32(context / high)
        return np.where(short, one, np.where(long, float32(factor), between))

    def notes(self, config: Config, context: int) -> list[str]:
        """What llama.cpp will compute otherwise than the config asks."""
        if self.kind == "dynamic":
            return [
                f"{config.path}: llama.cpp has no dynamic rope scaling; texts beyond {context} tokens are read without"
            ]
        if self.kind in ("longrope", "su"):
            return [
                f"{config.path}: llama.cpp has no factors for rope_type {self.kind!r} in this architecture; positions "
                "are read without scaling"
            ]
        if self.kind != "yarn":
            return []
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "extrapolation_factor": 1.0, "mscale": math.nan}
        usual |= dict.fromkeys(("attention_factor", "attn_factor"), 0.1 * math.log(max(self.values["factor"], 1)) + 1)
        odd = [
            f"{name} = {value:g}"
            for name, value in self.values.items()
            if name in usual and not math.isclose(value, usual[name], rel_tol=1e-3)
        ]
        if not odd:
            return []
        return [f"{config.path}: llama.cpp does not heed {', '.join(odd)} of YaRN in this architecture"]


def read_rope(config: Config, default_theta: float, context: int, kinds: tuple[str, ...] = KINDS) -> Rope:
    """Rotary base and scaling from the fields of transformers 5 (rope_parameters) or older ones.

    kinds: what llama.cpp's code for the family can compute. Raises GgufMoeError for any other, for a missing or
    impossible number, and for partly rotated heads.
    """
    values = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(values, dict):
        raise GgufMoeError(f"{config.path}: rope parameters are {values!r}, expected an object")
    nested = Config(config.path, values)
    theta = nested.number("rope_theta", config.number("rope_theta", default_theta))
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in kinds:
        raise GgufMoeError(
            f"{config.path}: rope_type {kind!r} is not known to llama.cpp in this architecture, expected one of "
            f"{', '.join(kinds)}"
        )
    if nested.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1:
        raise GgufMoeError(f"{config.path}: partial_rotary_factor is not 1, but llama.cpp rotates whole heads")
    return Rope(theta, kind, _read_values(nested, kind, context))


def _read_values(nested: Config, kind: str, context: int) -> dict[str, float]:
    defaults: dict[str, float | None] = {}
    if kind == "llama3":
        defaults = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind in ("linear", "yarn"):
        defaults = {"factor": None}
    values = {name: nested.number(name, default) for name, default in defaults.items()}
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = nested.integer("original_max_position_embeddings", context)
    if kind == "yarn":
        values |= {name: nested.number(name) for name in _FACTORS if nested.values.get(name) is not None}
        if nested.values.get("mscale") and nested.values.get("mscale_all_dim"):  # llama.cpp has no key for them
            values["mscale"] = nested.number("mscale")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise GgufMoeError(
            f"{nested.path}: high_freq_factor {values['high_freq_factor']:g} is not above low_freq_factor "
            f"{values['low_freq_factor']:g}"
        )
    return values
