"""Malicious weights files: no code runs, memory and time are bounded, and a clear message refuses them."""

import builtins
import contextlib
import io
import json
import math
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.serialization import get_safe_globals, safe_globals
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import SegmentationModel, yaml_model_load

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_detector, load_encoder, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore")


def refusal(path: Path, load=read_tensors) -> str:
    """Returns the message that refuses the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ") or message == f"{path} does not exist or is not a file."
    assert message.isprintable() and len(message) < len(str(path)) + 600
    return message


def plain(value: object) -> bytes:
    """The opcodes that push plain data."""
    return pickle.dumps(value, protocol=2)[2:-1]


def named(name: str) -> bytes:
    """The opcode that pushes a global, given as "module attribute"."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def call(name: str, *args: object) -> bytes:
    """The opcodes that call `name` with `args`; bytes in `args` are opcodes themselves."""
    pushed = b"".join(arg if isinstance(arg, bytes) else plain(arg) for arg in args)
    return named(name) + b"(" + pushed + b"tR"


def archive(program: bytes, *records: tuple[str, bytes], folder: str = "archive", compressed: bool = False) -> bytes:
    """A file in torch.save's format around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, content in (
            ("data.pkl", b"\x80\x02" + program + b"."),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
            *records,
        ):
            file.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def legacy(program: bytes) -> bytes:
    """A file in the format of torch.save before 1.6: five pickles in a row."""
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    pickles = [pickle.dumps(part, protocol=2) for part in header] + [b"\x80\x02" + program + b"."]
    return b"".join(pickles) + pickle.dumps([], protocol=2)


def storage(key: object = "0", numel: int = 4, kind: str = "torch FloatStorage") -> bytes:
    """The opcodes that refer to a storage in the file."""
    return b"(" + plain("storage") + named(kind) + plain(key) + plain("cpu") + plain(numel) + b"tQ"


def tensor(size: tuple, stride: tuple, offset: int = 0, of: bytes | None = None) -> bytes:
    """The opcodes for a tensor."""
    hooks = call("collections OrderedDict")
    return call("torch._utils _rebuild_tensor_v2", of or storage(), offset, size, stride, False, hooks)


def weights(**tensors: bytes) -> bytes:
    """The opcodes for a dictionary of tensors."""
    return b"}(" + b"".join(plain(name) + program for name, program in tensors.items()) + b"u"


RECORD = ("data/0", struct.pack("<4f", 1, 2, 3, 4))


def test_crafted_files_match_the_format_of_torch(tmp_path):
    """The harmless version of the files below loads here and in PyTorch."""
    (tmp_path / "good.pt").write_bytes(archive(weights(w=tensor((2, 2), (2, 1))), RECORD))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(torch.load(tmp_path / "good.pt", weights_only=True)["w"], expected)
    assert torch.equal(read_tensors(tmp_path / "good.pt")["w"], expected)


# Pickles that run code ----------------------------------------------------------------------------------------------

# name -> (opcodes for the paths of a marker and of a script that creates it, what the refusal names if anything)
ATTACKS = {
    "os.system": (lambda marker, script: call("os system", f"touch {marker}"), "os.system"),
    "posix.system": (lambda marker, script: call("posix system", f"touch {marker}"), "posix.system"),
    "subprocess": (
        lambda marker, script: call("subprocess check_output", ["touch", marker]),
        "subprocess.check_output",
    ),
    "exec": (lambda marker, script: call("builtins exec", f"open({marker!r}, 'w')"), "builtins.exec"),
    "eval": (lambda marker, script: call("builtins eval", f"open({marker!r}, 'w')"), "builtins.eval"),
    "open": (lambda marker, script: call("builtins open", marker, "w"), "builtins.open"),
    "python 2 name": (lambda marker, script: call("__builtin__ open", marker, "w"), "builtins.open"),
    "runpy": (lambda marker, script: call("runpy run_path", script), "runpy.run_path"),
    "timeit": (
        lambda marker, script: call("timeit timeit", f"open({marker!r}, 'w')", "", named("time perf_counter"), 1),
        "timeit.timeit",
    ),
    "pathlib": (lambda marker, script: call("pathlib Path.touch", call("pathlib PosixPath", marker)), "pathlib.Path"),
    "pickle": (lambda marker, script: call("pickle loads", call("builtins bytes", [])), "pickle.loads"),
    "importlib": (lambda marker, script: call("importlib import_module", "antigravity"), "importlib.import_module"),
    "__import__": (lambda marker, script: call("builtins __import__", "antigravity"), "builtins.__import__"),
    "webbrowser": (lambda marker, script: call("webbrowser open", "http://127.0.0.1:9/"), "webbrowser.open"),
    "pip": (lambda marker, script: call("pip._internal main", ["install", script]), "pip._internal.main"),
    "torch.hub": (lambda marker, script: call("torch.hub load", script, "x"), "torch.hub.load"),
    "torch.load": (lambda marker, script: call("torch load", script), "torch.load"),
    "torch.jit": (lambda marker, script: call("torch.jit load", script), "torch.jit.load"),
    "numpy": (lambda marker, script: call("numpy.core.multiarray _reconstruct", marker), "numpy.core.multiarray"),
    "numpy.load": (lambda marker, script: call("numpy load", script, b"N", b"\x88"), "numpy.load"),
    "rmtree": (lambda marker, script: call("shutil rmtree", marker), "shutil.rmtree"),
    "through a module's global": (
        lambda marker, script: call("torch.serialization os.system", f"touch {marker}"),
        "torch.serialization.os.system",
    ),
    "through an allowed prefix": (
        lambda marker, script: call("torch.nn.modules.module functools.os.system", f"touch {marker}"),
        None,
    ),
    "a re-exported torch.load": (lambda marker, script: call("torch.nn.modules.module torch.load", marker), None),
    "through ultralytics": (
        lambda marker, script: call("ultralytics.nn.tasks contextlib.os.system", f"touch {marker}"),
        None,
    ),
    "AutoBackend": (lambda marker, script: call("ultralytics.nn.autobackend AutoBackend", marker), None),
    "getattr chain": (
        lambda marker, script: (
            named("builtins getattr")
            + b"("
            + call("builtins getattr", named("torch.nn.modules module"), "os")
            + plain("system")
            + b"tR("
            + plain(f"touch {marker}")
            + b"tR"
        ),
        None,
    ),
    "parse_model's eval": (
        lambda marker, script: call(
            "ultralytics.nn.tasks SegmentationModel",
            yaml_model_load("yolov8n-seg.yaml") | {"activation": f"open({marker!r}, 'w')"},
        ),
        None,
    ),
    "a tensor made by os.system": (
        lambda marker, script: call(
            "torch._tensor _rebuild_from_type_v2", named("os system"), named("torch Tensor"), (f"touch {marker}",), {}
        ),
        "os.system",
    ),
    "a tensor made by a module": (
        lambda marker, script: call(
            "torch._tensor _rebuild_from_type_v2",
            named("torch.nn.modules.module os.system"),
            named("torch Tensor"),
            (f"touch {marker}",),
            {},
        ),
        None,
    ),
    "a parameter that is called": (
        lambda marker, script: (
            call("torch._utils _rebuild_parameter", named("torch.nn.modules.module os.system"), b"\x88", b"N")
            + b"("
            + plain(f"touch {marker}")
            + b"tR"
        ),
        None,
    ),
    "state that replaces methods": (
        lambda marker, script: (
            named("torch.nn.modules.linear Linear")
            + b")\x81}("
            + plain("__setstate__")
            + named("builtins getattr")
            + plain("__class__")
            + named("torch.nn.modules.module os.system")
            + plain("_parameters")
            + call("torch.nn.modules.module os.system", f"touch {marker}")
            + b"ub}b"
        ),
        None,
    ),
    "state of what is called": (
        lambda marker, script: (
            named("collections OrderedDict")
            + b"N}("
            + plain("__code__")
            + named("torch.nn.modules.os system")
            + b"u\x86b)R"
        ),
        None,
    ),
}


@pytest.fixture
def marker(tmp_path):
    """Paths of a file that the attacks create, and of a script that creates it."""
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')")
    return str(marker), str(script)


@pytest.mark.parametrize("container", [archive, legacy])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, marker, attack, container):
    path, (program, names) = tmp_path / "weights.pt", ATTACKS[attack]
    path.write_bytes(container(program(*marker)))
    modules, handlers = set(sys.modules), get_safe_globals()
    message = refusal(path, load_detector)
    if names and container is archive:
        assert f"its pickle names {names}" in message
    assert {file.name for file in tmp_path.iterdir()} == {"weights.pt", "script.py"}
    assert not {"antigravity", "this"} & (set(sys.modules) - modules) and get_safe_globals() == handlers


@pytest.mark.parametrize("container", [archive, legacy])
@pytest.mark.parametrize(
    "attack",
    ["os.system", "posix.system", "subprocess", "exec", "eval", "open", "runpy", "timeit", "parse_model's eval"],
)
def test_attacks_work_without_protection(tmp_path, monkeypatch, marker, attack, container):
    """With an unprotected unpickler, the same files create the marker."""
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)  # parse_model changes it
    path = tmp_path / "weights.pt"
    path.write_bytes(container(ATTACKS[attack][0](*marker)))
    try:
        torch.load(path, weights_only=False)
    except Exception as error:
        assert attack == "parse_model's eval", error  # fails later because the activation is a file
    assert Path(marker[0]).exists()


@pytest.mark.parametrize(
    "program",
    {
        "PERSID": b"Pmodule\n",
        "no tuple": plain("0") + b"Q",
        "no storage": b"(" + plain("module") + named("torch FloatStorage") + plain(("0", "cpu", 4)) + b"tQ",
        "too long": plain(("storage", "x", "0", "cpu", 4, 5)) + b"Q",
        "no name": b"(" + plain("storage") + plain("os.system") + plain("0") + plain("cpu") + plain(4) + b"tQ",
        "other name": storage(kind="os system"),
        "outside": storage(key="../../../../../../etc/passwd"),
        "absolute": storage(key="/etc/passwd"),
        "no key": storage(key=0),
        "missing": storage(key="1"),
        "INST": b"(" + plain("true") + b"ios\nsystem\n",
        "OBJ": b"(" + named("torch Size") + plain("true") + b"o",
        "STACK_GLOBAL": plain("os") + plain("system") + b"\x93",
        "EXT1": b"\x82\x01",
        "NEWOBJ_EX": named("torch Size") + b")}\x92",
        "NEXT_BUFFER": b"\x97",
        "REDUCE of nothing": b"R",
        "STOP of nothing": b"",
        "no mark": b"t",
        "memo": b"h\x07",
    }.items(),
    ids=lambda item: item[0],
)
def test_opcodes_that_torch_does_not_write_are_refused(tmp_path, program):
    (tmp_path / "weights.pt").write_bytes(archive(program[1], RECORD))
    refusal(tmp_path / "weights.pt")


def test_plain_pickle_is_refused(tmp_path, marker):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x02" + call("os system", f"touch {marker[0]}") + b".")
    assert "not a zip file" in refusal(path)
    assert not Path(marker[0]).exists()


def test_allowlist_of_torch_is_ignored(tmp_path, seeded, marker):
    """ultralytics adds its real classes to torch's allowlist for the lifetime of the process."""
    path = tmp_path / "weights.pt"
    path.write_bytes(archive(ATTACKS["parse_model's eval"][0](*marker)))
    evil = tmp_path / "evil.pt"
    evil.write_bytes(archive(call("builtins open", marker[0], "w")))
    with safe_globals([SegmentationModel, (builtins.open, "builtins.open")]):
        before = set(get_safe_globals())
        refusal(path, load_detector)
        assert "builtins.open" in refusal(evil)
        assert not Path(marker[0]).exists()
        assert load_detector(seeded.detector_checkpoint) is not None
        assert set(get_safe_globals()) == before
        torch.load(evil, weights_only=True)  # the allowlist still applies to torch.load
        assert Path(marker[0]).exists()


def test_attributes_of_a_module_are_not_called(tmp_path):
    """A pickled module's hooks and shadowed methods are treated as plain data."""
    layer = nn.Linear(2, 1)
    layer.__dict__ |= {"state_dict": bytearray, "_state_dict_hooks": {0: bytearray}, "_modules": {}}
    torch.save({"model": layer}, tmp_path / "weights.pt")
    tensors = read_tensors(tmp_path / "weights.pt")
    assert tensors.keys() == {"weight", "bias"} and torch.equal(tensors["weight"], layer.weight)


def test_non_persistent_buffers_are_ignored(tmp_path):
    layer = nn.Linear(2, 1)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("cache", torch.ones(1), persistent=False)
    torch.save({"model": layer}, tmp_path / "weights.pt")
    assert read_tensors(tmp_path / "weights.pt").keys() == layer.state_dict().keys() == {"weight", "bias", "kept"}


# Archives -----------------------------------------------------------------------------------------------------------


def zipped(*entries: tuple[str, bytes], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for entry, content in entries:
            file.writestr(entry, content)
    return buffer.getvalue()


def overlapping(content: bytes) -> bytes:
    """An archive of 5000 overlapping records, each of which claims all of its bytes."""
    data = bytearray(zipped(("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", content)))
    end = data.rfind(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    directory = bytes(data[start:end])
    entry = directory[directory.rfind(b"PK\x01\x02") :]
    copies = b"".join(entry[:46] + f"archive/{i:06d}".encode() for i in range(5000))
    footer = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 5002, 5002, len(directory + copies), start, 0)
    return bytes(data[:start]) + directory + copies + footer


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


GOOD = archive(weights(w=tensor((4,), (1,))), RECORD)
PROGRAM = b"\x80\x02" + weights(w=tensor((4,), (1,))) + b"."

# name -> (the file, words in the refusal)
ARCHIVES = {
    "empty": (zipped(), "without a data.pkl"),
    "something else": (zipped(("word/document.xml", b"<xml/>")), "without a data.pkl"),
    "a zip in a zip": (zipped(("archive/weights.pt", GOOD)), "without a data.pkl"),
    "a zip as the pickle": (zipped(("archive/data.pkl", GOOD)), "is not a valid checkpoint"),
    "outside": (zipped(("../../data.pkl", PROGRAM), ("../../data/0", RECORD[1])), "without a data.pkl"),
    "a second pickle": (zipped(("a/data.pkl", PROGRAM), ("a/data.pkl", b"\x80\x02}.")), "the same name"),
    "compressed": (archive(weights(w=tensor((4,), (1,))), RECORD, compressed=True), "is compressed"),
    "TorchScript": (torchscript(), "TorchScript"),
    "another byte order": (GOOD.replace(b"little", b"middle"), "is not a valid checkpoint"),
    "overlapping": (overlapping(bytes(10_000)), "claim to be larger than the file"),
    "cut": (GOOD[:-30], "not a zip file"),
    "wrong sum": (GOOD.replace(RECORD[1], bytes(16)), "Bad CRC-32"),
    "a tar": (b"weights" + bytes(93) + b"0000644\0" + bytes(412), "not a zip file"),
    "numpy's objects": (b"\x93NUMPY\x01\x00" + PROGRAM, "not a zip file"),
    "numpy's archive": (zipped(("w.npy", b"\x93NUMPY" + PROGRAM)), "without a data.pkl"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_malformed_archives_are_refused(tmp_path, monkeypatch, name):
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    content, words = ARCHIVES[name]
    Path("weights.pt").write_bytes(content)
    assert words in refusal(Path("weights.pt"))
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "c", "weights.pt"]


@pytest.mark.parametrize("folder", ["..", "/etc", "", "C:\\Windows", "a\0b"])
def test_paths_in_archives_are_never_used(tmp_path, monkeypatch, folder):
    """Nothing is unpacked, so no path is written to."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("weights.pt").write_bytes(archive(weights(w=tensor((4,), (1,))), RECORD, folder=folder))
    try:
        assert read_tensors(Path("weights.pt"))["w"].tolist() == [1, 2, 3, 4]
    except CheckpointError as error:
        assert "without a data.pkl" in str(error)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["here", "weights.pt"]


@pytest.mark.parametrize(
    "program",
    {
        "storage beyond its record": tensor((1000,), (1,), of=storage(numel=1000)),
        "storage far beyond": tensor((10**12,), (1,), of=storage(numel=10**12)),
        "shape beyond its storage": tensor((5,), (1,)),
        "shape far beyond": tensor((10**9, 10**9), (10**9, 1)),
        "shape that overflows": tensor((2**62, 4), (4, 1)),
        "strides beyond": tensor((2,), (4,)),
        "strides that overflow": tensor((2,), (2**62,)),
        "negative strides": tensor((4,), (-1,), offset=3),
        "offset beyond": tensor((2,), (1,), offset=3),
        "negative offset": tensor((2,), (1,), offset=-1),
        "negative shape": tensor((-1,), (1,)),
        "numbers beyond all integers": tensor((2**500,), (0,)),
        "odd number of bytes": tensor((1,), (1,), of=storage(kind="torch DoubleStorage", key="odd")),
        "30 dimensions": tensor((1,) * 30, (1,) * 30),
    }.items(),
    ids=lambda item: item[0],
)
def test_tensors_that_exceed_their_storage_are_refused(tmp_path, program):
    (tmp_path / "weights.pt").write_bytes(archive(weights(w=program[1]), RECORD, ("data/odd", b"1234")))
    refusal(tmp_path / "weights.pt")


def test_huge_shapes_with_few_bytes_are_refused(tmp_path):
    """Zero strides can turn one number into any shape, so shapes are compared before any computation."""
    path = tmp_path / "weights.pt"
    shape = (2**20, 2**20)
    path.write_bytes(archive(weights(**{"patch_embed.seq.0.c.weight": tensor(shape, (0, 0))}), RECORD))
    assert "(1048576, 1048576) instead of (32, 3, 3, 3)" in refusal(path, lambda path: load_encoder(path, "tiny_vit"))
    names = ("model.0.conv.weight", "model.22.cv3.0.2.weight", "model.22.dfl.conv.weight")
    path.write_bytes(archive(weights(**{name: tensor((16, 16, 2**30, 2**20), (0,) * 4) for name in names}), RECORD))
    assert "detects 16 classes" in refusal(path, load_detector)


# Bombs for memory and time ------------------------------------------------------------------------------------------


def doubled(program: bytes, times: int) -> bytes:
    """Nested pairs: a tuple that holds the value twice, a tuple that holds that tuple twice, and so on."""
    return program + b"".join(b"q\x00h\x00\x86" for _ in range(times))


MANY = b"](" + b"K\x01" * 20_000 + b"e"  # a list of 20,000 numbers

BOMBS = {
    "bytearray": archive(weights(w=call("builtins bytearray", 10**11))),
    "bytes": archive(weights(w=call("builtins bytes", 10**11))),
    "storage": archive(weights(w=call("torch.storage UntypedStorage", 10**11))),
    "typed storage": archive(weights(w=call("torch FloatStorage", 10**11))),
    "tensor": archive(weights(w=call("torch Tensor", 10**11))),
    "typed tensor": archive(weights(w=call("torch FloatTensor", 10**11))),
    "codecs": archive(
        weights(
            w=(named("_codecs encode") + b"(") * 41
            + plain("ab")
            + plain("latin1")
            + b"tR"
            + (plain("hex") + b"tR") * 40
        )
    ),
    "quantized": archive(
        weights(
            w=call(
                "torch._utils _rebuild_qtensor",
                storage(kind="torch QInt8Storage"),
                *(0, (10**11,), (1,)),
                b"(" + named("torch per_tensor_affine") + plain(0.1) + plain(0) + b"t",
                *(False, {}),
            )
        ),
        RECORD,
    ),
    "a key to hash": archive(b"}" + doubled(plain("a"), 60) + b"K\x01s"),
    "a storage's key to hash": archive(
        b"("
        + plain("storage")
        + named("torch FloatStorage")
        + doubled(plain("a"), 60)
        + plain("cpu")
        + plain(4)
        + b"tQ",
        RECORD,
    ),
    "a set to hash": archive(call("builtins set", b"](" + doubled(plain("a"), 60) + b"e")),
    "sets of many": archive(MANY + b"\x85q\x01" + named("builtins set") + b"q\x02" + b"h\x02h\x01R" * 20_000),
    "a type to print": archive(
        call(
            "torch._utils _rebuild_tensor_v3",
            *(storage(), 0, (4,), (1,), False, {}),
            doubled(plain("a"), 60),
        ),
        RECORD,
    ),
    "names within names": archive(plain("x" * 10_000) + b"q\x02" + b"}h\x02" * 800 + b"}" + b"s" * 800),
    "dictionaries within each other": archive(plain("a").join([b"}"] * 20_000) + b"s" * 19_999),
    "tuples within each other": archive(b")" + b"\x85" * 50_000),
    "a memo far out": archive(weights(w=b"K\x01r\xff\xff\xff\xff")),
    "a string of 4 GB": archive(b"X\xff\xff\xff\xff"),
    "a number of 2 GB": archive(b"\x8b\xff\xff\xff\x7f"),
    "dimensions": archive(weights(w=tensor((1,) * 20_000, (1,) * 20_000)), RECORD),
    "compressed record": archive(weights(w=tensor((4,), (1,))), ("data/0", bytes(10**8)), compressed=True),
    "compressed version": zipped(("archive/data.pkl", PROGRAM), ("archive/version", bytes(10**8)), compressed=True),
    "compressed pickle": archive(b"N" * 10**7, compressed=True),
    "overlapping": overlapping(bytes(100_000)),
    "a pickle of 5 MB": archive(b"}" * 5 * 2**20),
}

PROGRAM_OF_BOMBS = """
import json, resource, sys, time
from pathlib import Path
from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_encoder, read_tensors

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    before, start = used(), time.monotonic()
    try:
        said = f"tensors {list(read_tensors(path))}"
    except CheckpointError as error:
        said = str(error)
    print(json.dumps([path.name, said, used() - before, time.monotonic() - start]), flush=True)
"""


@pytest.mark.slow
def test_bombs_are_refused_cheaply(tmp_path):
    for name, content in BOMBS.items():
        assert len(content) < 6 * 2**20
        (tmp_path / name).write_bytes(content)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM_OF_BOMBS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(reports) == len(BOMBS), (reports[-1:], ran.stderr[-2000:])
    for name, message, megabytes, seconds in reports:
        assert megabytes < 50 and seconds < 5, (name, message, megabytes, seconds)
        assert "memory" not in message.lower() and "alloc" not in message.lower(), (name, message)


# Not a file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def time_limit():
    """Ends a test that blocks."""

    def stop(*args):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "link to a pipe", "link to itself", "dangling"])
def test_special_files_are_refused(tmp_path, time_limit, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    if kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path.symlink_to({"device": "/dev/zero", "link to itself": path, "dangling": tmp_path / "gone"}[kind])
    assert refusal(path) == f"{path} does not exist or is not a file."


def test_impossible_file_names_are_refused(tmp_path):
    refusal(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match="does not exist or is not a file"):
        read_tensors(tmp_path / "a\0b.pt")
    with pytest.raises(CheckpointError, match="does not exist or is not a file"):
        read_tensors(tmp_path / os.fsdecode(b"\xff.pt"))


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "good.pt").write_bytes(GOOD)
    (tmp_path / "link.pt").symlink_to(tmp_path / "good.pt")
    assert list(read_tensors(tmp_path / "link.pt")) == ["w"]


# safetensors --------------------------------------------------------------------------------------------------------


def safetensors(header: dict | bytes, data: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = entry("F32", [8], 0, 32)
TWICE = json.dumps(ONE).encode()

# name -> the file
HEADERS = {
    "beyond the file": safetensors({"w": entry("F32", [9], 0, 36)}),
    "far beyond": safetensors({"w": entry("F32", [2**40], 0, 2**42)}),
    "less than the file": safetensors({"w": entry("F32", [4], 0, 16)}),
    "overlapping": safetensors({"w": ONE, "v": entry("F32", [4], 0, 16)}),
    "a hole": safetensors({"w": entry("F32", [4], 0, 16), "v": entry("F32", [2], 24, 32)}),
    "backwards": safetensors({"w": entry("F32", [8], 32, 0)}),
    "negative shape": safetensors({"w": entry("F32", [-8], 0, 32)}),
    "a shape that overflows": safetensors({"w": entry("F32", [2**62, 4], 0, 32)}),
    "another shape": safetensors({"w": entry("F32", [7], 0, 32)}),
    "unknown type": safetensors({"w": entry("F31", [8], 0, 32)}),
    "a header of 1 GB": safetensors({"w": ONE}, length=2**30),
    "a header beyond all integers": safetensors({"w": ONE}, length=2**64 - 1),
    "a header that is cut": safetensors({"w": ONE}, length=20),
    "a header of nothing": safetensors(b""),
    "no JSON": safetensors(b"{weights"),
    "a list": safetensors(b"[]"),
    "a deep one": safetensors(b"[" * 100_000),
    "a name twice": safetensors(b'{"w":' + TWICE + b',"w":' + TWICE + b"}"),
    "a key twice": safetensors(b'{"w":' + TWICE[:-1] + b',"shape":[2, 4]}}'),
    "metadata that is not text": safetensors({"__metadata__": {"a": 1}, "w": ONE}),
    "metadata that is a list": safetensors({"__metadata__": ["a"], "w": ONE}),
    "a pickle": PROGRAM,
    "an archive": GOOD,
}


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_safetensors_headers_are_refused(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(HEADERS[name])
    assert "is not a valid safetensors file: " in refusal(tmp_path / "w.safetensors")


def test_order_of_tensors_in_the_header_is_irrelevant(tmp_path):
    """It may differ from the order of their bytes."""
    header = {"b": entry("F32", [1], 4, 8), "a": entry("F32", [1], 0, 4)}
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, struct.pack("<2f", 1, 2)))
    assert {name: tensor.item() for name, tensor in read_tensors(tmp_path / "w.safetensors").items()} == {
        "a": 1,
        "b": 2,
    }


# Contents of tensors ------------------------------------------------------------------------------------------------

SAM, DETECTOR = (PACKAGED_WEIGHTS / f"demo_{name}.safetensors" for name in ("sam", "detector"))
# part of a model -> (a file that contains it, its loader, one of its tensors, that tensor's name in the module)
PARTS = {
    "encoder": (
        SAM,
        lambda path: load_encoder(path, "resnet_demo"),
        "image_encoder.neck.input_ops.0.conv.weight",
        "neck.input_ops.0.conv.weight",
    ),
    "decoder": (
        SAM,
        lambda path: load_decoder(path, "resnet_demo"),
        "mask_decoder.mask_tokens.weight",
        "mask_decoder.mask_tokens.weight",
    ),
    "detector": (DETECTOR, load_detector, "model.0.conv.weight", "model.0.conv.weight"),
}
SAVE = {".safetensors": save_file, ".pt": torch.save}


@pytest.mark.parametrize("suffix", SAVE)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_weights_are_refused(tmp_path, part, suffix, value):
    """A single value, the last one of a tensor, is enough."""
    file, load, name, inner = PARTS[part]
    tensors, path = load_file(file), tmp_path / f"weights{suffix}"
    tensors[name].view(-1)[-1] = value
    SAVE[suffix](tensors, path)
    assert f": 1 with NaN or infinite values: {inner}" in refusal(path, load)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_wrong_dtypes_are_refused(tmp_path, part, dtype):
    file, load, name, inner = PARTS[part]
    tensors, path = load_file(file), tmp_path / "weights.safetensors"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path)
    assert f": 1 of the wrong type: {inner} {dtype} instead of torch.float32" in refusal(path, load)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_float_dtypes_are_converted(tmp_path, dtype):
    """This includes the counters of batch norms, which are integers in the model."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(SAM).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    loaded = load_encoder(tmp_path / "weights.safetensors", "resnet_demo").state_dict()
    assert all(torch.equal(loaded[name], tensors[f"image_encoder.{name}"].to(loaded[name].dtype)) for name in loaded)


def test_values_beyond_float32_are_refused(tmp_path):
    tensors = load_file(SAM)
    name = "image_encoder.neck.input_ops.0.conv.weight"
    tensors[name] = torch.full(tensors[name].shape, 1e300, dtype=torch.float64)
    torch.save(tensors, tmp_path / "weights.pt")
    assert "with NaN or infinite values" in refusal(tmp_path / "weights.pt", PARTS["encoder"][1])


def test_negative_variances_are_refused(tmp_path):
    """Their square root would be NaN in the first inference."""
    tensors = load_file(DETECTOR)
    tensors["model.0.bn.running_var"][0] = -1
    save_file(tensors, tmp_path / "weights.safetensors")
    message = refusal(tmp_path / "weights.safetensors", load_detector)
    assert "1 with negative variances: model.0.bn.running_var" in message


def test_overflow_in_fusing_the_detector_is_refused(tmp_path):
    tensors = {name: tensor.float() for name, tensor in load_file(DETECTOR).items()}
    tensors["model.0.conv.weight"] *= 1e36
    tensors["model.0.bn.weight"] *= 1e36
    save_file(tensors, tmp_path / "weights.safetensors")
    message = refusal(tmp_path / "weights.safetensors", load_detector)
    assert "not a usable detector: 1 with NaN or infinite values: model.0.conv.weight" in message


def test_tensor_names_are_shortened_in_messages(tmp_path):
    """A file can contain any name; the message stays short, printable and on one line."""
    name = "a\n<script>\x1b[31m" + "x" * 10**6
    save_file({name: torch.zeros(1)}, tmp_path / "weights.safetensors")
    for load in (load_detector, PARTS["encoder"][1], PARTS["decoder"][1]):
        refusal(tmp_path / "weights.safetensors", load)
    (tmp_path / "weights.pt").write_bytes(archive(named(f"{'x' * 10**6} y")))
    refusal(tmp_path / "weights.pt")


def with_valid_checksums(archive: bytes) -> bytes:
    """The readable part of the archive, with corrected checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            start = item.header_offset + 30 + sum(struct.unpack_from("<2H", archive, item.header_offset + 26))
            new.writestr(item.filename, archive[start : start + item.file_size])
    return buffer.getvalue()


def flipped(data: bytes, flips: list[tuple[float, int]], near_start: bool) -> bytes:
    """Flips these bits, optionally only near the start, where everything but the numbers is."""
    data = bytearray(data)
    for place, bit in flips:
        data[int(place * min(len(data), 5000 if near_start else len(data)))] ^= 1 << bit
    return bytes(data)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    contents = {}
    for file in (SAM, DETECTOR):
        contents[f"{file.stem}.safetensors"] = file.read_bytes()
        torch.save(load_file(file), folder / f"{file.stem}.pt")
        contents[f"{file.stem}.pt"] = (folder / f"{file.stem}.pt").read_bytes()
    return contents


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=20),
    near_start=st.booleans(),
    fix_checksums=st.booleans(),
)
@pytest.mark.parametrize("suffix", SAVE)
@pytest.mark.parametrize("part", PARTS)
def test_flipped_bits_give_valid_weights_or_a_refusal(
    tmp_path, whole_files, part, suffix, flips, near_start, fix_checksums
):
    """Loaded weights are finite and have the right shapes, even where the archive's checksums are valid."""
    file, load, *_ = PARTS[part]
    path = tmp_path / f"weights{suffix}"
    data = flipped(whole_files[file.stem + suffix], flips, near_start)
    if fix_checksums and suffix == ".pt":
        with contextlib.suppress(Exception):
            data = with_valid_checksums(data)
    path.write_bytes(data)
    try:
        loaded = load(path).state_dict()
    except CheckpointError as error:
        assert str(error).startswith(f"{path} ") and str(error).isprintable()
        return
    expected = load(file).state_dict()
    assert {name: tensor.shape for name, tensor in loaded.items()} == {name: t.shape for name, t in expected.items()}
    assert all(tensor.isfinite().all() for tensor in loaded.values())
