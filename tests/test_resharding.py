"""`split` and `merge`: every byte comes back, whole files or none, and what is wrong is refused in one line."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import gguf
import gguf_files as by_hand
import pytest
from gguf_files import BOOL, F32, STRING, U8, U32, changed, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf_input import I32, U16
from test_gguf_layouts import SHARDS, sharded

from gguf_moe.errors import GgufMoeError
from gguf_moe.filling import Progress
from gguf_moe.gguf_reader import TENSOR_TYPES, read_gguf
from gguf_moe.resharding import plan_merge, plan_split, reshard
from gguf_moe.sharding import Splitting

Tensor = tuple[str, tuple[int, ...], bytes]  # type, dimensions with the row's length first, bytes


def model(path: Path, keys: Iterable[bytes], tensors: dict[str, Tensor], align: int = 32) -> Path:
    """A GGUF file by hand."""
    infos, data = [], b""
    for name, (kind, dimensions, content) in tensors.items():
        infos.append(by_hand.info(name, dimensions, TENSOR_TYPES[kind].id, len(data)))
        data += content + bytes(-len(content) % align)
    path.write_bytes(by_hand.container(keys, infos, data, align))
    return path


def tensor(lots: random.Random, kind: str, blocks: int = 3, outer: tuple[int, ...] = (2,)) -> Tensor:
    """Any bytes at all, so damaged scales and NaN too."""
    count = blocks
    for length in outer:
        count *= length
    stored = TENSOR_TYPES[kind]
    return kind, (blocks * stored.block_length, *outer), lots.randbytes(count * stored.block_bytes)


def odd_keys() -> list[bytes]:
    """Every type of value, alone and in arrays, and what a reader might not keep."""
    arrays = by_hand.ARRAY
    keys = [by_hand.key("general.architecture", STRING, by_hand.text("none"))]
    for kind in gguf.GGUFValueType:
        if kind not in (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING):
            width = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(int(kind), 4)
            value = bytes(range(0x81, 0x81 + width))
            keys.append(by_hand.key(f"x.{kind.name}", int(kind), value))
            keys.append(by_hand.key(f"x.{kind.name}s", arrays, by_hand.array(int(kind), 3, value * 3)))
    for name, content in {"latin": b"caf\xe9", "nul": b"a\0b", "empty": b"", "text": "Straße".encode()}.items():
        keys.append(by_hand.key(f"x.{name}", STRING, by_hand.text(content)))
    several = by_hand.text(b"\xff") + by_hand.text(b"") + by_hand.text(b"a\0b")
    keys.append(by_hand.key("x.texts", arrays, by_hand.array(STRING, 3, several)))
    keys.append(by_hand.key("x.none", arrays, by_hand.array(U32, 0)))
    keys.append(by_hand.key("x.two", BOOL, b"\x02"))
    keys.append(by_hand.key("x.signalling", F32, struct.pack("<I", 0x7FA00001)))
    return [*keys, by_hand.key("general.alignment", U32, struct.pack("<I", 32)), by_hand.key("ключ", U8, b"\x07")]


def odd(path: Path) -> Path:
    """Every key of `odd_keys`, every type of tensor, and shapes that llama.cpp's tools would not keep."""
    lots = random.Random(1)
    tensors = {f"t.{kind}": tensor(lots, kind) for kind in TENSOR_TYPES}
    tensors["scalar"] = ("F32", (), b"\1\2\3\4")
    tensors["one"] = tensor(lots, "Q4_K", 1, (1, 1, 1))
    return model(path, odd_keys(), tensors)


@pytest.mark.parametrize(
    "splitting", [Splitting(1), Splitting(5000), Splitting(max_tensors=7), Splitting(tensors_in_first=False)], ids=repr
)
def test_every_byte_comes_back(splitting: Splitting, tmp_path: Path) -> None:
    source = odd(tmp_path / "in.gguf")
    plan = plan_split(source, splitting)
    reshard(plan, tmp_path / "out.gguf")
    shards = [file.path(tmp_path / "out.gguf") for file in plan.files]
    assert sum(len(read_gguf(shard).tensors) for shard in shards) == len(TENSOR_TYPES) + 2
    reshard(plan_merge(shards[0]), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15)
values = st.one_of(
    st.binary(max_size=9).map(lambda data: (STRING, by_hand.text(data))),
    st.lists(st.binary(max_size=5), max_size=4).map(
        lambda texts: (by_hand.ARRAY, by_hand.array(STRING, len(texts), b"".join(map(by_hand.text, texts))))
    ),
    st.binary(min_size=4, max_size=4).map(lambda data: (F32, data)),
    st.binary(max_size=9).map(lambda data: (by_hand.ARRAY, by_hand.array(BOOL, len(data), data))),
)
shapes = st.tuples(st.sampled_from(sorted(TENSOR_TYPES)), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3))
own = {"general.alignment", "general.type", "general.file_type", "split.no", "split.count", "split.tensors.count"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    keys=st.dictionaries(names.filter(lambda name: name not in own), values, max_size=6),
    tensors=st.dictionaries(names, shapes, min_size=4, max_size=8),
    splitting=st.builds(Splitting, st.none() | st.integers(1, 4000), st.integers(1, 3), st.booleans()),
)
def test_any_file_comes_back(keys: dict, tensors: dict, splitting: Splitting, tmp_path: Path) -> None:
    lots = random.Random(len(tensors))
    content = {name: tensor(lots, kind, blocks, tuple(outer)) for name, (kind, blocks, outer) in tensors.items()}
    packed = [by_hand.key(name, kind, value) for name, (kind, value) in keys.items()]
    source = model(tmp_path / "in.gguf", packed, content)
    plan = plan_split(source, splitting)
    reshard(plan, tmp_path / "out", force=True)
    reshard(plan_merge(plan.files[0].path(tmp_path / "out")), tmp_path / "back", force=True)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_shards_are_cut_anew(run, made, tmp_path: Path) -> None:
    first, direct, again = (tmp_path / name for name in ("first.gguf", "direct.gguf", "again.gguf"))
    assert run("split", made("json", "Q4_K_M"), "--split-max-size", "2M", "-o", first).exit_code == 0
    assert run("split", made("json", "Q4_K_M"), "--split-max-tensors", 9, "-o", direct).exit_code == 0
    shard = tmp_path / "first-00001-of-00004.gguf"
    assert run("split", shard, "--split-max-tensors", 9, "-o", again).exit_code == 0
    for i in range(1, 6):
        suffix = f"-{i:05}-of-00005.gguf"
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"direct{suffix}").read_bytes()
    # The same names as those that are read: refused, forced or not.
    for options in ([], ["--force"]):
        result = run("split", shard, "--split-max-size", "2M", *options)
        message = f"gguf-moe: {shard}: is the input itself; name another file with --output\n"
        assert (result.exit_code, result.stderr) == (1, message)


def test_default_names_are_beside_the_input(run, made, tmp_path: Path) -> None:
    source = Path(shutil.copy(made("json", "Q2_K"), tmp_path / "a.b-Q2_K.gguf"))
    result = run("split", source, "--split-max-tensors", 22)
    assert result.stdout.splitlines()[0].split() == ["shard", "tensors", "bytes"]
    first, second = (tmp_path / f"a.b-Q2_K-0000{i}-of-00002.gguf" for i in (1, 2))
    assert result.stdout.splitlines()[-1].startswith(f"{first} and 1 more shard written in ")
    assert sorted(tmp_path.iterdir()) == [first, second, source]
    assert run("merge", first).stderr.splitlines()[-1] == f"gguf-moe: {source}: exists; use --force to replace it"
    source.unlink()
    assert run("merge", first, "--dry-run").stdout.splitlines()[-1] == f"would be written to {source}"
    result = run("merge", first)
    assert result.stdout.splitlines()[-1].startswith(f"{source} written in ")
    assert source.read_bytes() == made("json", "Q2_K").read_bytes()
    (tmp_path / "out").mkdir()
    assert run("merge", first, "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / source.name).read_bytes() == source.read_bytes()


def test_keys_of_an_earlier_merge_are_set_anew(run, made, tmp_path: Path) -> None:
    """llama-gguf-split --merge leaves them, with a count of 0."""

    def change(parts: by_hand.Parts) -> None:
        parts.keys = {"split.no": gguf.GGUFValue(0, U16), **parts.keys}
        parts.set("split.tensors.count", 43, I32)
        parts.set("split.count", 0, U16)

    source = changed(made("json", "Q2_K"), tmp_path / "in.gguf", change)
    for path, name in ((source, "x"), (made("json", "Q2_K"), "y")):
        assert run("split", path, "--split-max-tensors", 22, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "x-00001-of-00002.gguf").read_bytes() == (tmp_path / "y-00001-of-00002.gguf").read_bytes()
    assert "is a whole file" in refusal(run, tmp_path, "merge", source)


def test_one_of_one_is_merged(run, made, tmp_path: Path) -> None:
    """llama-gguf-split makes such files."""
    (shard,) = sharded(made("json", "Q2_K"), tmp_path / "in", 1)
    assert run("merge", shard, "-o", tmp_path / "out.gguf").exit_code == 0
    assert (tmp_path / "out.gguf").read_bytes() == made("json", "Q2_K").read_bytes()


@pytest.mark.parametrize("align", [8, 64, 4096])
def test_another_alignment_becomes_the_default(align: int, run, made, tmp_path: Path) -> None:
    source = load(made("json", "Q2_K")).save(tmp_path / "in.gguf", align)
    for path, name in ((source, "x"), (made("json", "Q2_K"), "y")):
        assert run("split", path, "--split-max-tensors", 22, "-o", tmp_path / name).exit_code == 0
    for i in (1, 2):
        shards = [tmp_path / f"{name}-0000{i}-of-00002.gguf" for name in "xy"]
        assert shards[0].read_bytes() == shards[1].read_bytes()


def refusal(run, directory: Path, *arguments: object) -> str:
    """The one line that a command prints; asserts that nothing is left in the directory."""
    before = sorted(directory.iterdir())
    result = run(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result.output
    assert sorted(directory.iterdir()) == before
    return result.stderr


@pytest.mark.parametrize("command", [("merge",), ("split", "--split-max-tensors", "5")], ids=" ".join)
@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_do_not_fit(case: str, command: tuple[str, ...], run, made, tmp_path: Path) -> None:
    change, message = SHARDS[case]
    path = change(sharded(made("json", "Q4_0"), tmp_path / "in", 3))
    assert message in refusal(run, path.parent, *command, path)


def test_a_truncated_shard(run, made, tmp_path: Path) -> None:
    first, second, _ = sharded(made("json", "Q4_0"), tmp_path / "in", 3)
    data = second.read_bytes()
    for size in (0, 3, 20, 100, len(data) // 2, len(data) - 33):
        second.write_bytes(data[:size])
        assert f"{second}: not a readable GGUF file" in refusal(run, first.parent, "merge", first)


def test_any_damage_to_a_header_is_refused_or_harmless(run, made, tmp_path: Path) -> None:
    """One byte changed, 150 times: an error of one line or a whole file, never a crash or half a file."""
    first, second = sharded(made("json", "Q2_K"), tmp_path / "in", 2)
    good, lots = second.read_bytes(), random.Random(5)
    end = read_gguf(second).data_start
    outcomes = set()
    for _ in range(150):
        at = lots.randrange(end)
        second.write_bytes(good[:at] + bytes([lots.randrange(256)]) + good[at + 1 :])
        try:
            reshard(plan_merge(first), tmp_path / "out.gguf", force=True)
        except GgufMoeError as error:
            outcomes.add("refused" if "\n" not in str(error) else "more than a line")
        else:
            outcomes.add("made")
            assert len(read_gguf(tmp_path / "out.gguf").tensors) == 43
    assert outcomes == {"refused", "made"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.gguf"]


def test_what_is_not_to_be_done(run, made, tmp_path: Path) -> None:
    whole, imatrix = made("json", "Q2_K"), tmp_path / "imatrix.gguf"
    changed(whole, imatrix, lambda parts: parts.set("general.type", "imatrix", gguf.GGUFValueType.STRING))
    assert refusal(run, tmp_path, "merge", whole) == (
        f"gguf-moe: {whole}: is a whole file, expected the first of several shards; nothing to merge\n"
    )
    assert refusal(run, tmp_path, "split", whole, "--split-max-size", "1G") == (
        f"gguf-moe: {whole}: its 43 tensors fit into one shard; nothing to split\n"
    )
    assert "general.type is 'imatrix', expected 'model'" in refusal(
        run, tmp_path, "split", imatrix, "--no-tensor-first-split"
    )
    assert "not readable" in refusal(run, tmp_path, "merge", tmp_path / "none.gguf")
    result = run("split", whole)
    message = "gguf-moe: give --split-max-size, --split-max-tensors or --no-tensor-first-split\n"
    assert (result.exit_code, result.stderr) == (2, message)


def test_what_follows_the_last_tensor_is_not_lost_without_a_word(run, made, tmp_path: Path) -> None:
    source = Path(shutil.copy(made("json", "Q2_K"), tmp_path / "in.gguf"))
    last = read_gguf(source).tensors[-1]
    with source.open("ab") as file:
        file.write(b"signature" * 4)
    assert f"in.gguf: 36 bytes follow the last tensor, {last.name}, expected padding of less than 32" in refusal(
        run, tmp_path, "split", source, "--split-max-tensors", 22
    )
    shards = sharded(made("json", "Q2_K"), tmp_path / "in", 2)
    with shards[1].open("ab") as file:
        file.write(bytes(32))
    assert f"{shards[1]}: 32 bytes follow" in refusal(run, shards[0].parent, "merge", shards[0])


def test_the_inputs_and_existing_files_stay(run, made, tmp_path: Path) -> None:
    shards = sharded(made("json", "Q2_K"), tmp_path / "in", 3)
    before = [shard.read_bytes() for shard in shards]
    alias = tmp_path / "alias.gguf"
    alias.hardlink_to(shards[2])
    for target in (shards[1], alias):
        assert f"{target}: is the input itself" in refusal(run, tmp_path, "merge", shards[0], "-o", target, "--force")
    assert [shard.read_bytes() for shard in shards] == before
    taken = tmp_path / "x-00002-of-00004.gguf"
    taken.write_text("mine")
    arguments = ("split", made("json", "Q2_K"), "--split-max-size", "1M", "-o", tmp_path / "x")
    assert refusal(run, tmp_path, *arguments) == f"gguf-moe: {taken}: exists; use --force to replace it\n"
    assert taken.read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0
    assert taken.read_bytes()[:4] == b"GGUF"


def test_too_little_space_is_found_before_writing(run, made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ("split", made("json", "Q2_K"), "--split-max-size", "1M", "-o", tmp_path / "x")
    assert "but only 1000000 are free on that disk" in refusal(run, tmp_path, *arguments)


@pytest.mark.parametrize("when", [0.1, 0.9])
def test_an_error_in_the_middle_leaves_nothing(when: float, made, tmp_path: Path) -> None:
    plan = plan_split(made("json", "Q2_K"), Splitting(1_000_000))

    def fail(progress: Progress) -> None:
        if progress.done > when * progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(plan, tmp_path / "out.gguf", on_progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_first_shard_is_there_only_when_all_are(made, tmp_path: Path) -> None:
    plan = plan_split(made("json", "Q2_K"), Splitting(1_000_000))
    taken = plan.files[1].path(tmp_path / "out.gguf")
    with pytest.raises(GgufMoeError, match="appeared while it was being written"):
        reshard(plan, tmp_path / "out.gguf", on_progress=lambda progress: taken.write_text("precious"))
    assert taken.read_text() == "precious"
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        *("out-00002-of-00004.gguf", "out-00003-of-00004.gguf", "out-00004-of-00004.gguf")
    ]


def test_an_input_that_becomes_shorter_is_noticed(made, tmp_path: Path) -> None:
    source = Path(shutil.copy(made("json", "Q2_K"), tmp_path / "in.gguf"))
    plan = plan_split(source, Splitting(1_000_000))
    os.truncate(source, 2_000_000)
    with pytest.raises(GgufMoeError, match=r"in\.gguf: changed since it was opened: tensor .* ends early"):
        reshard(plan, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [source]


def test_more_shards_than_files_may_be_open_leave_nothing(made, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    code = f"{limit}; from gguf_moe.cli import main; main()"
    arguments = ["split", str(made("json", "Q2_K")), "--split-max-tensors", "1", "-o", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gguf-moe: {tmp_path / 'x'}: not written: [Errno 24] Too many open files")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A tensor of a gigabyte, in a sparse file."""
    source = tmp_path / "in.gguf"
    infos = [by_hand.info("big", (1 << 28,), 0), by_hand.info("small", (8,), 0, 1 << 30)]
    source.write_bytes(by_hand.container((), infos))
    os.truncate(source, source.stat().st_size + (1 << 30) + 32)
    limit = 200 << 20
    for arguments in (["split", source, "--split-max-tensors", 1], ["merge", tmp_path / "in-00001-of-00002.gguf"]):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))"
        code += "; from gguf_moe.cli import main; main()"
        if arguments[0] == "merge":
            source.unlink()
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert read_gguf(source).tensors[1].offset == 1 << 30
