"""`verify` says of good files that they are good, and finds whatever is not: one bit anywhere is enough."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import MERGE, bundled, with_experts
from gguf_files import U32, changed, container, info, key, sharded
from neighbour_quantizer import quantize
from variants import narrow

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.checksums import LIST, write_sums
from gguf_moe.convert import convert
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.gguf_source import open_gguf
from gguf_moe.origin import Origin
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request
from gguf_moe.sharding import Splitting
from gguf_moe.verify import Verdict, verify

RANDOM_TYPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_S", "Q8_0", "BF16")
BITS_OF_EACH = 25


class Subject:
    """A good file in two directories, one with a list of hashes, and the model that it derives from."""

    def __init__(self, source: Path, model: Path, directory: Path) -> None:
        self.good, self.origin = source.read_bytes(), Origin(open_checkpoint(model), Request())
        self.listed, self.bare = (directory / name / source.name for name in ("listed", "bare"))
        for path in (self.listed, self.bare):
            path.parent.mkdir(parents=True)
            path.write_bytes(self.good)
        write_sums(self.listed.parent, {source.name: hashlib.sha256(self.good).hexdigest()})
        self.file = read_gguf(self.bare)

    def verdicts(self, data: bytes) -> tuple[Verdict, Verdict, Verdict]:
        """By the list, by the model, and with neither."""
        for path in (self.listed, self.bare):
            path.write_bytes(data)
        return verify(self.listed), verify(self.bare, origin=self.origin), verify(self.bare)

    def flipped(self, at: int, bit: int = 0) -> bytes:
        data = bytearray(self.good)
        data[at] ^= 1 << bit
        return bytes(data)

    def data_at(self, number: int) -> int:
        return self.file.data_start + self.file.tensors[number].offset


@pytest.fixture(scope="module")
def subject(made, merges, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(made("json", "Q4_K_M"), merges["json"], tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def padded(run, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A merge with rows of 100 weights, so that tensors do not fill their 32 bytes; the last is a norm."""
    directory = tmp_path_factory.mktemp("padded")
    model = narrow(with_experts(bundled(), 3, layers=1), 100).save(directory / "Narrow")
    assert run("convert", model, "--quant", "BF16", "-o", directory / "narrow.gguf").exit_code == 0
    return Subject(directory / "narrow.gguf", model, directory)


def after(text: str, skip: int = 0) -> Callable[[Subject], int]:
    return lambda subject: subject.good.index(text.encode()) + len(text) + skip


def first_gap(subject: Subject) -> int:
    ends = [subject.data_at(i) + t.nbytes for i, t in enumerate(subject.file.tensors)]
    return next(end for end in ends if end % 32)


# The bit, where it is, and whether it is seen without a list and without the model.
PLACES: dict[str, tuple[Callable[[Subject], int], int, bool]] = {
    "magic": (lambda s: 0, 0, True),
    "version, to 2": (lambda s: 4, 0, False),
    "version, to 7": (lambda s: 4, 2, True),
    "number of tensors": (lambda s: 8, 0, True),
    "number of keys": (lambda s: 16, 0, True),
    "length of a key": (lambda s: 24, 0, True),
    "name of a key": (after("general.nam", -1), 0, False),
    "type of a value": (after("llama.block_count"), 1, False),
    "integer": (after("llama.block_count", 4), 0, False),
    "true that is no 1": (after("tokenizer.ggml.add_bos_token", 4), 3, False),
    "float": (after("llama.rope.freq_base", 4), 0, False),
    "length of a text": (after("general.name", 4), 0, True),
    "text": (after("general.name", 12), 0, False),
    "type of an array": (after("tokenizer.ggml.scores", 4), 0, True),
    "length of an array": (after("tokenizer.ggml.scores", 8), 0, True),
    "element of an array": (after("tokenizer.ggml.scores", 400), 0, False),
    "a token": (after("tokenizer.ggml.tokens", 24), 0, False),
    "name of a tensor": (after("output_norm.w", -1), 0, False),
    "dimensions of a tensor": (after("output_norm.weight"), 0, True),
    "dimension of a tensor": (after("output_norm.weight", 4), 5, True),
    "type of a tensor": (after("output_norm.weight", 12), 1, True),
    "offset of a tensor": (after("output_norm.weight", 16), 5, True),
    "padding after the header": (lambda s: s.file.data_start - 1, 7, True),
    "data": (lambda s: s.data_at(0) + 100, 3, False),
    "last byte": (lambda s: len(s.good) - 1, 0, False),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bit_at_every_kind_of_place(place: str, subject: Subject) -> None:
    find, bit, alone = PLACES[place]
    listed, against, bare = subject.verdicts(subject.flipped(find(subject), bit))
    assert (listed.good, against.good) == (False, False)
    assert bare.good != alone, bare.problems


def test_a_bit_in_the_data_of_each_tensor(subject: Subject) -> None:
    generator = random.Random(1)
    for number, tensor in enumerate(subject.file.tensors):
        at = subject.data_at(number) + generator.randrange(tensor.nbytes)
        listed, against, _ = subject.verdicts(subject.flipped(at, generator.randrange(8)))
        assert "SHA-256 is" in listed.problems[-1]
        found, expected = subject.listed.read_bytes()[at], subject.good[at]
        difference = f": byte {at} of the file is {found:02x}, expected {expected:02x}"
        assert against.problems[-1].startswith(f"tensor {tensor.name}: ")
        assert against.problems[-1].endswith(difference)


def test_padding_after_a_tensor_and_at_the_end(padded: Subject) -> None:
    assert all(verdict.good for verdict in padded.verdicts(padded.good))
    for at in (first_gap(padded), len(padded.good) - 1):
        against = padded.verdicts(padded.flipped(at))[1]
        assert against.proven[-1] == f"data of {len(padded.file.tensors)} tensors as {padded.origin.name} gives them"
        for verdict in padded.verdicts(padded.flipped(at)):
            assert verdict.problems[0].startswith(f"byte {at}, padding after tensor ")
            assert verdict.problems[0].endswith(", is 01, expected 00")


@pytest.mark.parametrize("quant", RANDOM_TYPES)
def test_random_bits(quant: str, made, merges, tmp_path: Path) -> None:
    """Where a list or the model is at hand, none is missed; with neither, most are: weights may be anything."""
    subject = Subject(made("json", quant), merges["json"], tmp_path)
    assert all(verdict.good for verdict in subject.verdicts(subject.good))
    generator = random.Random(quant)
    alone = 0
    for number in range(BITS_OF_EACH):  # a fifth of them before the data, which would otherwise be met too seldom
        at = generator.randrange(subject.file.data_start if number % 5 == 0 else len(subject.good))
        listed, against, bare = subject.verdicts(subject.flipped(at, generator.randrange(8)))
        assert (listed.good, against.good) == (False, False), at
        alone += not bare.good
    assert alone < BITS_OF_EACH


def test_truncated_appended_and_swapped(subject: Subject, padded: Subject) -> None:
    for data, message in (
        (
            subject.good + b"\0",
            f"the file has {len(subject.good) + 1} bytes, expected {len(subject.good)}; bytes too many: 1",
        ),
        (subject.good[:-5], "the file is truncated, bytes missing: 5"),
        (subject.good[: len(subject.good) // 2], "truncated"),
        (subject.good[:1000], "not a readable GGUF file"),
        (b"", "the file is empty"),
    ):
        for verdict in subject.verdicts(data):
            assert message in verdict.problems[0]
    short = len(padded.good) - 1
    for verdict in padded.verdicts(padded.good[:-1]):
        assert verdict.problems[0] == f"the file has {short} bytes, expected {short + 1}; bytes missing: 1"
    a, b = subject.data_at(0), subject.data_at(0) + 144  # whole blocks
    swapped = subject.good[:a] + subject.good[b : b + 144] + subject.good[a:b] + subject.good[b + 144 :]
    assert [verdict.good for verdict in subject.verdicts(swapped)] == [False, False, True]


@pytest.mark.parametrize("quant", ["Q4_K_M", "F32", "F16", "BF16"])
def test_what_is_not_finite_is_named(quant: str, subject: Subject, made, tmp_path: Path) -> None:
    def spoil(parts) -> None:
        kind, shape, data = parts.tensors["blk.1.attn_k.weight"]
        value, at = {
            "Q8_0": (struct.pack("<e", np.inf), 34 * 19),
            "Q4_K": (struct.pack("<e", np.nan), 144 * 19),
            "F32": (struct.pack("<f", -np.inf), 4 * (3 * 256 + 7)),
            "F16": (struct.pack("<e", np.nan), 2 * (3 * 256 + 7)),
            "BF16": (struct.pack("<H", 0x7F80), 2 * (3 * 256 + 7)),
        }[kind]
        parts.tensors["blk.1.attn_k.weight"] = (kind, shape, data[:at] + value + data[at + len(value) :])

    verdict = verify(changed(made("json", quant), tmp_path / "x.gguf", spoil))
    where = "block 0 of row 19 has a scale that is" if quant == "Q4_K_M" else "weight 7 of row 3 is"
    assert verdict.problems == [f"tensor blk.1.attn_k.weight: {where} infinite or NaN"]


def test_types_without_a_codec_are_not_proven(tmp_path: Path) -> None:
    infos = [info("a", (256,), 16), info("b", (4,), 26, 96), info("c", (4,), 0, 128)]  # IQ2_XXS, I32, F32
    (tmp_path / "x.gguf").write_bytes(container([], infos, bytes(160)))
    verdict = verify(tmp_path / "x.gguf")
    assert verdict.proven == ["structure", "2 tensors finite"]
    assert verdict.unproven[0] == "whether 1 tensors of IQ2_XXS are finite"


def test_a_header_that_lies_costs_nothing(merges, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(container([key("general.alignment", U32, struct.pack("<I", 1 << 30))]))
    verdict = verify(path, origin=Origin(open_checkpoint(merges["json"]), Request()))
    assert verdict.problems[0].endswith(f"expected {1 << 30}; bytes missing: {(1 << 30) - path.stat().st_size}")
    assert verdict.problems[1].startswith("general.file_type is missing, expected one that gguf-moe makes of ")


def test_differing_keys_are_listed_and_the_data_still_compared(made, merges, tmp_path: Path) -> None:
    def rename(parts) -> None:
        parts.set("general.name", "Other", gguf.GGUFValueType.STRING)
        parts.set("tokenizer.ggml.bos_token_id", 7, gguf.GGUFValueType.UINT32)
        parts.keys["tokenizer.ggml.scores"].value[5] = -1.5
        del parts.keys["llama.rope.freq_base"]

    path = changed(made("json", "Q5_0"), tmp_path / "x.gguf", rename)
    origin = Origin(open_checkpoint(merges["json"]), Request())
    verdict = verify(path, origin=origin)
    assert [problem.split(" expected")[0] for problem in verdict.problems] == [
        "key general.name is 'Other' (STRING),",
        "key tokenizer.ggml.scores has element 5 -1.5,",
        "key tokenizer.ggml.bos_token_id is 7 (UINT32),",
        "key llama.rope.freq_base is missing,",
    ]
    assert verdict.problems[0].endswith("; give --name as it was made with")
    assert verdict.proven[-1] == f"data of 43 tensors as {origin.name} gives them"


def test_a_model_with_another_weight(made, tmp_path: Path) -> None:
    parts = bundled()
    dtype, array = parts.tensors["model.layers.2.self_attn.v_proj.weight"]
    array = array.copy()
    array[5, 40] ^= 0x8000  # its sign
    parts.tensors["model.layers.2.self_attn.v_proj.weight"] = (dtype, array)
    model = parts.save(tmp_path / MERGE.name)
    verdict = verify(made("json", "Q8_0"), origin=Origin(open_checkpoint(model), Request()))
    assert len(verdict.problems) == 1
    assert verdict.problems[0].startswith("tensor blk.2.attn_v.weight: block 1 of row 5: byte ")
    parts.tensors["model.layers.2.self_attn.v_proj.weight"] = (dtype, np.full_like(array, 0x7FC0))
    verdict = verify(made("json", "Q8_0"), origin=Origin(open_checkpoint(parts.save(model)), Request()))
    assert "tensor model.layers.2.self_attn.v_proj.weight holds NaN at [0, 0]" in verdict.problems[0]


def test_other_options(run, made, merges) -> None:
    result = run("verify", made("json", "Q4_K_M"), "--against", merges["json"], "--name", "Foo", "--pure")
    assert result.exit_code == 1
    assert "key general.name is 'TidePool 4x4M v1' (STRING), expected 'Foo' (STRING); give --name" in result.stdout
    assert "tensor output.weight is Q6_K [4096, 256], expected Q4_K [4096, 256]; give the options" in result.stdout


def test_options_that_it_was_made_with(run, merges, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    options = [
        "--tensor-type",
        "ffn_down_exps=Q6_K",
        "--name",
        "Foo",
        "--override-kv",
        "tokenizer.ggml.bos_token_id=int:5",
    ]
    assert run("convert", merges["json"], "--bits", 4, "-o", path, *options).exit_code == 0
    assert run("verify", path, "--against", merges["json"], *options).exit_code == 0
    assert run("verify", path, "--against", merges["json"], *options[:-2]).exit_code == 1


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K", "IQ4_XS", "Q8_0", "F16"])
def test_files_of_llama_cpps_quantizer_derive_from_the_checkpoint(quant: str, made, merges, tmp_path: Path) -> None:
    path = tmp_path / f"x-{quant}.gguf"
    quantize(made("spm", "BF16"), path, quant)
    if quant == "F16":  # its quantizer orders keys and tensors otherwise than its converter
        origin = Origin(open_checkpoint(merges["spm"]), Request())
        assert verify(path, origin=origin).proven[-1] == f"data of 43 tensors as {origin.name} gives them"
        return
    assert verify(path, origin=Origin(open_checkpoint(merges["spm"]), Request())).good
    assert verify(path, origin=Origin(open_gguf(made("spm", "BF16")), Request())).good


def test_a_gguf_file_that_was_copied_or_quantized_anew(run, made, tmp_path: Path) -> None:
    for source, options in (
        (made("json", "BF16"), ()),
        (made("json", "Q4_K_M"), ()),
        (made("json", "BF16"), ("--quant", "BF16")),
    ):
        path = tmp_path / "x.gguf"
        assert run("convert", source, "-o", path, "--force", *options).exit_code == 0
        assert run("verify", path, "--against", source).exit_code == 0


def test_shards(made, merges, tmp_path: Path) -> None:
    paths = sharded(made("json", "Q4_0"), tmp_path / "shards", 3)
    origin = Origin(open_checkpoint(merges["json"]), Request())
    for path in paths:
        verdict = verify(path, origin=origin)
        assert verdict.problems == []
        assert verdict.proven[-1] == f"derives from {origin.name} bit for bit"
    for path in paths:
        data = path.read_bytes()
        for text in ("split.no", "split.count", "split.tensors.count"):
            at = data.index(text.encode()) + len(text) + 4
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert not verify(path, origin=origin).good, text
        path.write_bytes(data)
    paths[2].rename(tmp_path / "gone.gguf")
    assert verify(paths[0]).problems == [f"is the first of 3 shards, but {paths[2].name} is missing"]
    assert verify(paths[1]).good
    shutil.copy(sharded(made("json", "Q4_K_M"), tmp_path / "others", 3)[2], paths[2])
    assert not verify(paths[2], origin=origin).good
    paths[0].unlink()
    assert "not readable" in verify(paths[1], origin=origin).problems[0]


def test_shards_of_our_own(made, merges, tmp_path: Path) -> None:
    """Those of the converter and of the splitter order their keys otherwise; one may hold the metadata alone."""
    checkpoint = open_checkpoint(merges["json"])
    for quant in ("Q4_K_M", "BF16"):
        for splitting in (Splitting(max_bytes=1_000_000), Splitting(max_tensors=10, tensors_in_first=False)):
            directory = tmp_path / f"{quant}-{splitting.max_tensors}"
            directory.mkdir()
            plan = make_plan(checkpoint, find_file_type(quant), Request(splitting=splitting))
            convert(plan, directory / "x.gguf")
            origin = Origin(checkpoint, Request())
            verdicts = [verify(path, origin=origin) for path in sorted(directory.iterdir())]
            assert len(verdicts) == len(plan.files) > 3
            assert [verdict.problems for verdict in verdicts] == [[]] * len(verdicts)


def test_what_the_command_says(run, made, merges, tmp_path: Path) -> None:
    for quant in ("Q4_0", "Q8_0"):
        shutil.copy(made("json", quant), tmp_path / f"{quant}.gguf")
    a, b, missing = (tmp_path / name for name in ("Q4_0.gguf", "Q8_0.gguf", "no.gguf"))
    write_sums(tmp_path, {a.name: hashlib.sha256(a.read_bytes()).hexdigest()})
    result = run("verify", a, missing, b, "--against", merges["json"])
    assert (result.exit_code, result.stderr) == (1, "")
    derives = f"derives from {merges['json']} bit for bit"
    lines = result.stdout.splitlines()
    assert lines[0] == f"{a}: good: structure, 43 tensors finite, SHA-256 as in {LIST}, {derives}"
    assert lines[1].startswith(f"{missing}: BAD: not readable: ")
    assert lines[2] == f"{b}: good: structure, 43 tensors finite, {derives}; not proven: SHA-256 (not named in {LIST})"
    assert lines[3:] == ["2 of 3 files are good"]
    facts = json.loads(run("verify", b, "--json").stdout)
    assert facts["good"] == 1
    assert facts["files"][0]["unproven"] == [f"SHA-256 (not named in {LIST})", "content"]
    (tmp_path / LIST).write_text("damaged")
    assert run("verify", a).exit_code == 1
    (tmp_path / LIST).unlink()
    assert run("verify", a).stdout.splitlines()[0].endswith(f"; not proven: SHA-256 (no {LIST} beside it), content")


def test_a_file_that_is_not_finished_is_not_good(made, tmp_path: Path) -> None:
    """All of its bytes may be finite, and its holes are zeros."""
    path = tmp_path / "x.gguf.partial"
    shutil.copy(made("json", "Q4_0"), path)
    assert verify(path).problems == ["is a partial file of an unfinished run"]


def test_wrong_calls(run, made, merges, tmp_path: Path) -> None:
    path = made("json", "Q4_0")
    for arguments, code, message in (
        ([], 2, "Missing argument"),
        ([path, "--name", "x"], 2, "options of a conversion need --against MODEL"),
        ([path, "--against", merges["json"], "--tensor-type", "nothing=Q8_0"], 2, "nothing"),
        ([path, "--against", tmp_path / "none"], 1, "no such directory"),
    ):
        result = run("verify", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), result.output
