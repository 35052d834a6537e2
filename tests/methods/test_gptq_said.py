"""What a file's keys say of the method that chose its codes: hostile values, other methods, files that only claim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import Parts, changed
from gptq_runs import KINDS, NEAR, OTHER_DATA

from gguf_moe.gguf_reader import read_gguf
from gguf_moe.verify import verify


def setting(name: str, value: object, kind: KINDS, element: KINDS | None = None) -> Callable[[Parts], None]:
    return lambda parts: parts.set(f"gguf_moe.gptq.{name}", value, kind, element)


def removing(name: str) -> Callable[[Parts], object]:
    return lambda parts: parts.keys.pop(f"gguf_moe.gptq.{name}")


HASH = hashlib.sha256(b"").hexdigest()
HOSTILE: dict[str, tuple[Callable[[Parts], object], str]] = {
    "damping 0": (
        setting("damping", 0.0, KINDS.FLOAT32),
        "damping is 0.0 (FLOAT32), expected a positive number (FLOAT32)",
    ),
    "damping negative": (
        setting("damping", -0.5, KINDS.FLOAT32),
        "damping is -0.5 (FLOAT32), expected a positive number (FLOAT32)",
    ),
    "damping infinite": (
        setting("damping", math.inf, KINDS.FLOAT32),
        "damping is inf (FLOAT32), expected a positive number (FLOAT32)",
    ),
    "damping NaN": (
        setting("damping", math.nan, KINDS.FLOAT32),
        "damping is nan (FLOAT32), expected a positive number (FLOAT32)",
    ),
    "damping a text": (
        setting("damping", "0.01", KINDS.STRING),
        "damping is '0.01' (STRING), expected a positive number (FLOAT32)",
    ),
    "no damping": (removing("damping"), "damping is missing, expected a positive number (FLOAT32)"),
    "chunks negative": (setting("chunks", -1, KINDS.INT32), "chunks is -1 (INT32), expected a number (UINT32)"),
    "no chunks": (removing("chunks"), "chunks is missing, expected a number (UINT32)"),
    "calibrated on nothing": (
        setting("calibrated_on", "nothing", KINDS.STRING),
        "calibrated_on is 'nothing' (STRING), expected 'quantized' or 'original' (STRING)",
    ),
    "calibrated on no text": (
        setting("calibrated_on", b"\xff", KINDS.STRING),
        "calibrated_on is b'\\xff' (STRING), expected 'quantized' or 'original' (STRING)",
    ),
    "no hash": (removing("text_sha256"), "text_sha256 is missing, expected one text of 64 hexadecimal digits (ARRAY)"),
    "a hash that is short": (
        setting("text_sha256", [HASH[:6]], KINDS.ARRAY, KINDS.STRING),
        f"text_sha256 is ['{HASH[:6]}'] of 1 elements (ARRAY), expected one text of 64 hexadecimal digits (ARRAY)",
    ),
    "two hashes": (
        setting("text_sha256", ["a", "b"], KINDS.ARRAY, KINDS.STRING),
        "text_sha256 is ['a', 'b'] of 2 elements (ARRAY), expected one text of 64 hexadecimal digits (ARRAY)",
    ),
    "hashes that are numbers": (
        setting("text_sha256", [1, 2, 3], KINDS.ARRAY, KINDS.INT32),
        "text_sha256 is [1, 2] of 3 elements (ARRAY), expected one text of 64 hexadecimal digits (ARRAY)",
    ),
    "a hash that is no array": (
        setting("text_sha256", HASH, KINDS.STRING),
        f"text_sha256 is '{HASH[:59]} (STRING), expected one text of 64 hexadecimal digits (ARRAY)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_keys(case: str, level, origin, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    file = read_gguf(changed(level("Q2_K"), tmp_path / "x.gguf", change))
    assert origin.expected(file).header_differences(file) == [f"key gguf_moe.gptq.{message}; make the file anew"]


def test_with_a_hostile_key_the_rest_is_compared_all_the_same(level, origin, tmp_path: Path) -> None:
    change, message = HOSTILE["no damping"]
    verdict = verify(changed(level("Q2_K"), tmp_path / "x.gguf", change), origin=origin)
    assert verdict.problems == [f"key gguf_moe.gptq.{message}; make the file anew"]
    assert verdict.proven == ["structure", "43 tensors finite", OTHER_DATA, NEAR]


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        ("awq", KINDS.STRING, "'awq' (STRING)"),
        ("rtn", KINDS.STRING, "'rtn' (STRING)"),
        (7, KINDS.UINT32, "7 (UINT32)"),
        (["gptq"], KINDS.ARRAY, "an array (ARRAY)"),
    ],
)
def test_a_method_that_is_not_known(value: object, kind: KINDS, found: str, level, origin, tmp_path: Path) -> None:
    element = KINDS.STRING if kind is KINDS.ARRAY else None
    path = changed(level("Q2_K"), tmp_path / "x.gguf", lambda p: p.set("gguf_moe.method", value, kind, element))
    verdict = verify(path, origin=origin)
    assert verdict.problems == [
        f"key gguf_moe.method is {found}, expected 'gptq' (STRING), the only method that this version can check; "
        "verify with the gguf-moe that made the file"
    ]
    assert verdict.proven == ["structure", "43 tensors finite"]


def test_keys_in_another_order_and_other_keys(level, origin, tmp_path: Path) -> None:
    def reorder(parts: Parts) -> None:
        parts.keys["gguf_moe.gptq.damping"] = parts.keys.pop("gguf_moe.gptq.damping")

    path = changed(level("Q2_K"), tmp_path / "x.gguf", reorder)
    number = list(read_gguf(path).values).index("gguf_moe.gptq.calibrated_on")
    assert verify(path, origin=origin).problems == [
        f"key {number} is gguf_moe.gptq.calibrated_on, expected gguf_moe.gptq.damping: another order"
    ]
    path = changed(level("Q2_K"), tmp_path / "x.gguf", lambda parts: parts.set("general.name", "Foo", KINDS.STRING))
    verdict = verify(path, origin=origin)
    (problem,) = verdict.problems
    assert problem.startswith("key general.name is 'Foo' (STRING), expected ")
    assert verdict.proven[-2:] == [OTHER_DATA, NEAR]


def test_a_file_that_only_claims_to_be_such_a_one(level, made, origin, tmp_path: Path) -> None:
    """The plain encoder's codes lie near the weights; but the embedding is not weighed as it would be."""
    keys = {key: value for key, value in read_gguf(level("Q2_K")).values.items() if key.startswith("gguf_moe.")}
    path = changed(made("json", "Q2_K"), tmp_path / "x.gguf", lambda parts: parts.keys.update(keys))
    verdict = verify(path, origin=origin)
    (problem,) = verdict.problems
    assert problem.startswith("tensor token_embd.weight: block 0 of row 0: byte ")
    assert verdict.proven[-1] == NEAR
