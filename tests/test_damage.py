"""Random damage to every other kind of file that is read: a toolkit error or a value comes out, and nothing else.

Seeds are fixed. Longer runs were made by hand (1,500 files a kind; 400 of torch, 75 plans); what they found is mended.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from calib import ranges
from calib.arrays import open_npy, open_npz
from calib.errors import DataError, ToolkitError
from calib.inputs import Column
from calib.ranges import Ranges, TensorRange
from relu_deploy.cli.inspect import render
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.engines.inspect import inspect_engine
from relu_deploy.engines.manifest import manifest_path, read_manifest
from relu_deploy.errors import EngineError

ROUNDS = 60
ODD: tuple[Any, ...] = (None, True, -1, 1e400, "x", [], {}, [1], {"a": 1}, 1.5, "\x1b[2J", 10**30, float("nan"))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, cut, insert and copy."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, other, kind = rng.randrange(len(out)), rng.randrange(len(out)), rng.randrange(4)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and len(out) > 16:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 5))
        else:
            out[at : at + 1] = out[other : other + rng.randrange(1, 12)]
    return bytes(out)


def altered(value: Any, rng: random.Random) -> Any:
    """JSON in which one entry, somewhere, is another thing or gone."""
    copy = json.loads(json.dumps(value))
    inside, last = copy, None
    while isinstance(inside, (dict, list)) and inside:
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        last = (inside, key)
        if rng.random() < 0.3:
            break
        inside = inside[key]
    holder, key = last
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return copy


def survives(path: Path, make: Callable[[random.Random], bytes], read: Callable[[Path], object]) -> None:
    """Read many damaged files; some have to be refused, or the damage is none."""
    refused = 0
    for seed in range(ROUNDS):
        path.write_bytes(make(random.Random(seed)))  # noqa: S311 - damage, not a secret
        try:
            read(path)
        except ToolkitError:
            refused += 1
    assert refused > ROUNDS // 10


def drain(column: Column) -> None:
    if column.shape:
        assert sum(1 for _ in column.rows()) == column.shape[0]
    else:
        column.read()


def read_npy(path: Path) -> None:
    with open_npy(path) as column:
        drain(column)


def read_npz(path: Path) -> None:
    with open_npz(path) as columns:
        for column in columns.values():
            drain(column)


def test_npy(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((2, 3), np.float32))
    good = (tmp_path / "good.npy").read_bytes()
    survives(tmp_path / "bad.npy", lambda rng: damaged(good[:128], rng) + good[128:], read_npy)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, write):
    write(tmp_path / "good.npz", x=np.ones((2, 3), np.float32), y=np.ones(4, np.int64))
    good = (tmp_path / "good.npz").read_bytes()
    survives(tmp_path / "bad.npz", lambda rng: damaged(good, rng), read_npz)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3",  # once: an exception of Python's tokenizer
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1180591620717411303424)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "0," * 70 + ")}\n",
        "(" * 9000,
    ],
)
def test_headers_of_npy(tmp_path, text):
    (tmp_path / "x.npy").write_bytes(header(text))
    with pytest.raises(DataError):
        read_npy(tmp_path / "x.npy")


def test_a_zip_bomb_is_refused_by_what_it_claims(tmp_path):
    """The directory of the archive says how much it unpacks to; nothing is unpacked."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        archive.writestr("x.npy", header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9)}\n") + b"0" * 81)
        archive.filelist[0].file_size = 1 << 40
    with pytest.raises(DataError, match="claims to unpack to 1024 GiB"):
        read_npz(tmp_path / "x.npz")


def test_an_archive_that_holds_less_than_its_header_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        text = "{'descr': '|u1', 'fortran_order': False, 'shape': (9, 8000000000)}\n"
        archive.writestr("x.npy", header(text))
    with pytest.raises(DataError, match="is cut short"):
        read_npz(tmp_path / "x.npz")


def test_ranges(tmp_path):
    found = {"x": TensorRange(-1, 1, "float32", 2, 1, np.float32([-1, 0]), np.float32([1, 1]))}
    ranges.save(Ranges(found, "0" * 64, "f" * 64, "max", 2), tmp_path / "good.json")
    good = (tmp_path / "good.json").read_bytes()
    survives(tmp_path / "bad.json", lambda rng: damaged(good, rng), ranges.load)
    survives(tmp_path / "bad.json", lambda rng: json.dumps(altered(json.loads(good), rng)).encode(), ranges.load)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, residual_model) -> Path:
    path: Path = tmp_path_factory.mktemp("engine") / "e.onnx"
    get_backend("ort").build(residual_model(activation="Silu"), path, BuildConfig())
    return path


def show(engine: Path) -> None:
    Console(file=io.StringIO()).print(render(inspect_engine(engine), layers=True))


def test_manifests(engine):
    path = manifest_path(engine)
    good = path.read_bytes()
    try:
        survives(path, lambda rng: damaged(good, rng), lambda _: show(engine))
        survives(path, lambda rng: json.dumps(altered(json.loads(good), rng)).encode(), lambda _: show(engine))
        for name, value in (("engine_bytes", [1]), ("versions", 7), ("sm", [[1]]), ("build_seconds", "soon")):
            path.write_text(json.dumps({**json.loads(good), name: value}))
            with pytest.raises(EngineError, match=f"is not the manifest of an engine.*{name}"):
                read_manifest(engine)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("start", [b"vtrt", b"ftrt"])
def test_plans(tmp_path, start):
    """Whatever follows the first bytes: what cannot be read is not known, and told so."""
    rng = random.Random(0)  # noqa: S311 - damage, not a secret
    blocks = [b"header {\n", b"descriptors {\n", b"main {\n", b"\n}\n", b'  gemm={ name="a" input={ "b" } }\n']
    for _ in range(ROUNDS):
        noise = b"".join(rng.choice([rng.randbytes(20), *blocks]) for _ in range(50))
        (tmp_path / "x.plan").write_bytes(start + noise)
        show(tmp_path / "x.plan")
    (tmp_path / "x.plan").write_bytes(
        start + b"header {\n" * 20_000
    )  # bounded: not a search from each of them to the end
    show(tmp_path / "x.plan")


@pytest.mark.torch
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None,
    reason="needs the extra: pip install 'relu-deploy[torch]'",
)
@pytest.mark.parametrize("kind", ["w.pt", "w.safetensors", "m.pt2"])
def test_files_of_torch(tmp_path, kind):
    import torch
    from safetensors.torch import save_file

    from relu_deploy.export.pt2 import load_pt2
    from relu_deploy.export.weights import read_state

    good, read = tmp_path / kind, load_pt2 if kind == "m.pt2" else read_state
    tensors = {"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int64)}
    if kind == "w.pt":
        torch.save(tensors, good)
    elif kind == "w.safetensors":
        save_file(tensors, good)
    else:
        torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2, 3),)), good)
    data = good.read_bytes()
    survives(tmp_path / f"bad{good.suffix}", lambda rng: damaged(data, rng), read)


def test_names_are_printed_as_they_are(tmp_path, residual_model):
    """Markup, escape codes and slashes in a layer's name reach the screen as text."""
    from click.testing import CliRunner

    from relu_deploy.cli import main

    model = residual_model(activation="Silu")
    names = ["[red]loud[/red]", "\x1b[2Jclear", "../../up", "a\rb"]
    for node, name in zip([n for n in model.graph.node if n.op_type == "Conv"], names, strict=False):
        node.name = name
    onnx.save(model, tmp_path / "m.onnx")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["inspect", str(tmp_path / "m.onnx"), "--layers"])
    assert result.exit_code == 0, result.output
    for shown in ("[red]loud[/red]", r"\x1b[2Jclear", "../../up"):
        assert shown in result.output
    assert "\x1b[2J" not in result.output
    assert "\r" not in result.output
    node.name = "\x1b[2Jclear"
    model.graph.node[0].op_type = "\x1b[2JConf"
    onnx.save(model, tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx")], color=True)
    assert result.exit_code == 2
    assert r"\x1b[2JConf" in result.stderr
    assert "\x1b[2J" not in result.stderr
