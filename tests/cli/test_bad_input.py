"""Bad input to every command that it can reach: the message, the exit code, and that no file is left or damaged."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from relu_deploy.graph import MAX_IR_VERSION, MAX_OPSET

RTX = "tensorrt-rtx"
# Commands that read an ONNX file; MODEL is replaced by it. Outputs go over an older good file.
READERS = {
    "rewrite": "rewrite MODEL -o old.out",
    "calibrate": "calibrate MODEL --calib x.npy -o old.out",
    "quantize": "quantize MODEL --ranges r.json -o old.out",
    "quantize for rtx": f"quantize MODEL --ranges r.json --target {RTX} -o old.out",
    "build ort": "build-engine MODEL -o old.out",
    "build ort int8": "build-engine MODEL --int8 --calib x.npy -o old.out --json old.json",
    "build rtx": f"build-engine MODEL --target {RTX} -o old.out",
    "inspect": "inspect MODEL --json old.out",
    "bench": "bench MODEL --against m.onnx --json old.out",
    "bench against": "bench m.onnx --against MODEL --json old.out",
}


def change(box: Path, **fields: int) -> None:
    """``m.onnx`` with another version, saved as ``bad.onnx``."""
    model = onnx.load(box / "m.onnx")
    model.ir_version = fields.get("ir", 8)
    model.opset_import[0].version = fields.get("opset", 17)
    onnx.save(model, box / "bad.onnx")


def cut(box: Path, share: float) -> None:
    whole = (box / "m.onnx").read_bytes()
    (box / "bad.onnx").write_bytes(whole[: int(len(whole) * share)])


def relocate(box: Path, location: str) -> None:
    model = onnx.load(box / "ext.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, box / "bad.onnx")


def wrong_operator(box: Path) -> None:
    model = onnx.load(box / "m.onnx")
    model.graph.node[0].op_type = "Conf"
    onnx.save(model, box / "bad.onnx")


MODELS = {
    "missing": (lambda box: None, "bad.onnx", "does not exist"),
    "a folder": (lambda box: (box / "bad.onnx").mkdir(), "bad.onnx", "is a folder"),
    "empty": (lambda box: (box / "bad.onnx").write_bytes(b""), "bad.onnx", "bad.onnx"),
    "text": (lambda box: (box / "bad.onnx").write_text("hello, world"), "bad.onnx", "bad.onnx"),
    "first half": (lambda box: cut(box, 0.5), "bad.onnx", "is not an ONNX file, or is cut short"),
    "last byte lost": (lambda box: cut(box, 0.9999), "bad.onnx", "is not an ONNX file, or is cut short"),
    "unknown operator": (wrong_operator, "bad.onnx", "bad.onnx is not a valid ONNX model: No Op registered for Conf"),
    "external data missing": (lambda box: (box / "weights.bin").unlink(), "ext.onnx", "is missing:"),
    "external data cut": (
        lambda box: (box / "weights.bin").write_bytes(b"\0" * 64), "ext.onnx", "is cut short: weights.bin has 64 bytes"
    ),
    "external data elsewhere": (
        lambda box: relocate(box, "../weights.bin"), "bad.onnx", "'../weights.bin', outside the folder of the model"
    ),
    "opset too new": (
        lambda box: change(box, opset=MAX_OPSET + 1), "bad.onnx", f"opset {MAX_OPSET + 1}; supported are 7 to"
    ),
    "opset too old": (lambda box: change(box, opset=6), "bad.onnx", "uses opset 6; supported are 7 to"),
    "IR too new": (lambda box: change(box, ir=MAX_IR_VERSION + 1), "bad.onnx", f"IR version {MAX_IR_VERSION + 1};"),
}  # fmt: skip


@pytest.mark.parametrize("command", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("damage", "model", "says"), MODELS.values(), ids=MODELS)
def test_a_bad_model(box, refused, damage, model, says, command):
    if RTX in command and importlib.util.find_spec("tensorrt_rtx") is None and command.startswith("build"):
        pytest.skip("needs the extra: pip install 'relu-deploy[tensorrt-rtx]'")
    damage(box)
    refused(command.replace("MODEL", model), says=says)


FEEDERS = {
    "calibrate": "calibrate m.onnx --calib DATA -o old.out",
    "build ort": "build-engine m.onnx --int8 --calib DATA -o old.out",
    "build rtx": f"build-engine m.onnx --int8 --calib DATA --target {RTX} --shape x=1x3x16x16 -o old.out",
    "bench": "bench m.onnx --against m.onnx --data DATA --json old.out",
}


def poisoned(value: float) -> np.ndarray:
    data = np.ones((50, 3, 16, 16), np.float32)
    data[37, 1, 2, 3] = value
    return data


def images(box: Path) -> None:
    (box / "data").mkdir()
    (box / "data" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")


DATA = {
    "missing": (lambda box: None, "none.npy", "none.npy does not exist"),
    "empty array": (lambda box: np.save("d.npy", np.ones((0, 3, 16, 16), "f4")), "d.npy", "d.npy is empty"),
    "empty folder": (lambda box: (box / "data").mkdir(), "data", "the folder data is empty"),
    "empty archive": (lambda box: np.savez("d.npz"), "d.npz", "d.npz is empty"),
    "wrong name": (lambda box: np.savez("d.npz", z=np.ones((2, 3, 16, 16), "f4")), "d.npz", "no array for input 'x'"),
    "wrong shape": (lambda box: np.save("d.npy", np.ones((2, 1, 16, 16), "f4")), "d.npy", "takes shape (?, 3, 16, 16)"),
    "channels last": (lambda box: np.save("d.npy", np.ones((2, 16, 16, 3), "f4")), "d.npy", "looks like NHWC"),
    "wrong type": (lambda box: np.save("d.npy", np.ones((2, 3, 16, 16), "u1")), "d.npy", "takes float32, the data is"),
    "NaN": (lambda box: np.save("d.npy", poisoned(np.nan)), "d.npy", "d.npy, sample 37: input 'x' contains NaN"),
    "Inf": (lambda box: np.save("d.npy", poisoned(-np.inf)), "d.npy", "d.npy, sample 37: input 'x' contains Inf"),
    "cut short": (lambda box: (box / "d.npy").write_bytes((box / "x.npy").read_bytes()[:-4]), "d.npy", "is cut short"),
    "no numbers": (lambda box: np.save("d.npy", np.array(["a"])), "d.npy", "not numbers"),
    "Python objects": (lambda box: np.save("d.npy", np.array([{}])), "d.npy", "holds Python objects"),
    "no archive": (lambda box: (box / "d.npz").write_bytes(b"PK\3\4"), "d.npz", "not a .npz file"),
    "damaged image": (images, "data", "a.png is not a readable image"),
    "no such module": (lambda box: None, "no_such_module_here:rows", "no module 'no_such_module_here'"),
}  # fmt: skip


@pytest.mark.parametrize("command", FEEDERS.values(), ids=FEEDERS)
@pytest.mark.parametrize(("make", "data", "says"), DATA.values(), ids=DATA)
def test_bad_data(box, refused, make, data, says, command):
    if RTX in command and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs the extra: pip install 'relu-deploy[tensorrt-rtx]'")
    if data == "data" and "images" in make.__name__ and importlib.util.find_spec("PIL") is None:
        pytest.skip("needs the extra: pip install 'relu-deploy[images]'")
    make(box)
    refused(command.replace("DATA", data), says=says)


ROOT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x) => (float[N, 2] y) { [root] r = Sqrt(x) y = Relu(r) }"""


@pytest.mark.parametrize("command", ["calibrate root.onnx", "build-engine root.onnx --int8"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_nan_inside_names_tensor_node_and_sample(box, refused, command, batch):
    onnx.save(onnx.parser.parse_model(ROOT), box / "root.onnx")
    data = np.ones((50, 2), np.float32)
    data[37, 1] = -1
    np.save(box / "d.npy", data)
    refused(
        f"{command} --calib d.npy -o old.out --batch-size {batch}",
        says="gives NaN in tensor 'r' (made by Sqrt node 'root') at sample 37",
    )


@pytest.mark.parametrize(
    "command",
    [
        "calibrate int8.onnx --calib x.npy -o old.out",
        "quantize int8.onnx --ranges r.json -o old.out",
        "build-engine int8.onnx --int8 --calib x.npy -o old.out",
        "build-engine int8.onnx --int8 --ranges r.json -o old.out",
    ],
)
def test_an_already_quantised_model(box, refused, command):
    refused(command, says="quantised already")


RANGE_READERS = (
    "quantize m.onnx --ranges bad.json -o old.out", "build-engine m.onnx --int8 --ranges bad.json -o old.out",
)  # fmt: skip


def stored(box: Path) -> dict:
    found: dict = json.loads((box / "r.json").read_text())
    return found


def edited(box: Path, **changes: object) -> None:
    """A ranges file in which the stem's output has other values."""
    value = stored(box)
    value["tensors"]["stem.out"].update(changes)
    (box / "bad.json").write_text(json.dumps(value))


def replaced(box: Path, **changes: object) -> None:
    """A ranges file with other entries."""
    (box / "bad.json").write_text(json.dumps({**stored(box), **changes}))


RANGES = {
    "missing": (lambda box: None, "it does not exist or is not a file"),
    "half written": (lambda box: (box / "bad.json").write_bytes((box / "r.json").read_bytes()[:400]), "not a whole"),
    "empty": (lambda box: (box / "bad.json").write_bytes(b""), "not a whole ranges file"),
    "another JSON": (lambda box: (box / "bad.json").write_text("[]"), "is not a ranges file"),
    "binary": (lambda box: (box / "bad.json").write_bytes(b"\xff\xfe\x00"), "not a whole ranges file"),
    "deep": (lambda box: (box / "bad.json").write_text("[" * 100_000), "not a whole ranges file"),
    "newer format": (lambda box: replaced(box, version=99), "format version 99"),
    "NaN": (lambda box: edited(box, max=float("nan")), "'stem.out' has nan where a finite float32 belongs"),
    "text": (lambda box: edited(box, max="wide"), "'stem.out' has 'wide' where a finite"),
    "turned around": (lambda box: edited(box, min=1e9), "'stem.out' has min"),
    "channels lost": (lambda box: edited(box, channel_max=[1.0]), "channel minima and"),
    "no count": (lambda box: edited(box, count=0), "count 0"),
    "no tensors": (lambda box: replaced(box, tensors=5), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("command", RANGE_READERS)
@pytest.mark.parametrize(("make", "says"), RANGES.values(), ids=RANGES)
def test_a_bad_ranges_file(box, refused, make, says, command):
    make(box)
    result = refused(command, says=says)
    assert "bad.json" in result.stderr


@pytest.mark.parametrize("command", RANGE_READERS)
def test_a_stale_ranges_file(box, done, refused, command, residual_model):
    onnx.save(residual_model(batch="N", seed=1), box / "other.onnx")
    done("calibrate other.onnx --calib x.npy -o bad.json")
    result = refused(command, says="was measured on another network")
    assert "Fix:" in result.stderr


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_dead_channels_work_and_are_told_and_no_scale_is_zero(box, done, target, residual_model):
    model = residual_model(batch="N")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[5] = -1e6
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, box / "dead.onnx")
    told = done("calibrate dead.onnx --calib x.npy -o dead.json")
    assert "1 of 16 channels are never above 0 (5)" in told
    done(f"quantize dead.onnx --ranges dead.json --target {target} -o out.onnx")
    written = onnx.load(box / "out.onnx")
    numbers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    scales = [numbers[n.input[1]] for n in written.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert scales
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales)


MISSING = {
    "export": ("torch", "export relu_deploy.demo.network:build_relu_network -o old.out", "[torch]"),
    "demo": ("torch", "demo -o demo", "[demo]"),
    "build rtx": ("tensorrt_rtx", f"build-engine m.onnx --target {RTX} -o old.out", "[tensorrt-rtx]"),
    "images": ("PIL", "calibrate m.onnx --calib photos -o old.out", "[images]"),
}  # fmt: skip


class Absent:
    """A finder that hides a package, whether it is imported or only looked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(("package", "command", "extra"), MISSING.values(), ids=MISSING)
def test_a_missing_package_names_its_extra(box, refused, monkeypatch, package, command, extra):
    (box / "photos").mkdir()
    (box / "photos" / "a.png").write_bytes(b"\x89PNG")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])
    refused(command, says=f"pip install 'relu-deploy{extra}'")


def test_the_data_centre_library_is_not_an_extra_that_pip_can_install(box, refused):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed here")
    refused("build-engine m.onnx --target tensorrt -o old.out", says="NVIDIA's own package host")


@pytest.mark.engine
def test_an_engine_without_a_gpu_to_run_it(box, done, refused):
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    done(f"build-engine m.onnx --target {RTX} --shape x=1x3x16x16 -o e.plan")
    refused("bench e.plan --against m.onnx --seconds 0.1 --json old.out", says="GPU")


def test_a_promise_that_is_broken_ends_with_1(box, refused, monkeypatch):
    from relu_deploy.engines import build

    monkeypatch.setattr(build, "disagreements", lambda model, audit: ("Conv 'stem' runs in fp32",))
    refused(
        "build-engine m.onnx --int8 --calib x.npy --require-int8 -o old.out",
        code=1,
        says="not the INT8 engine that was asked for: Conv 'stem' runs in fp32",
    )
