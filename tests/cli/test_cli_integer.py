"""``quantize --format qoperator --multipliers``: what it writes, what reads it, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from calib.session import open_session
from relu_deploy.graph import load_model
from relu_deploy.int8.multipliers_table import load_table

RTX = "tensorrt-rtx"


def test_integer_operators_and_their_table(box, done):
    printed = done("quantize m.onnx --ranges r.json --format qoperator --multipliers t.json -o q.onnx --json rep.json")
    integer = load_model(box / "q.onnx")
    ops = [node.op_type for node in integer.graph.node]
    assert ops.count("QLinearConv") == 5
    assert ops.count("QGemm") == 1
    assert {"QuantizeLinear"} == {op for op in ops if op in ("QuantizeLinear", "DequantizeLinear")}
    assert "5 QLinearConv" in printed
    table = load_table(box / "t.json", integer)
    assert next(entry["name"] for entry in table["entries"] if entry["op"] == "QLinearConv") == "stem"
    report = json.loads((box / "rep.json").read_text())["integer"]
    assert report["format"] == "qoperator"
    assert report["multipliers"] == sum(
        len(row["mantissa"]) for entry in table["entries"] for row in entry.get("multipliers", ())
    )
    assert report["worst_error"] <= 2.0**-31
    assert report["overflows"] == []
    x = {"x": np.load(box / "x.npy")}
    plain = open_session(load_model(box / "int8.onnx"), optimise=True, threads=1).run(None, x)[0]
    for optimise in (True, False):
        assert np.array_equal(open_session(integer, optimise=optimise, threads=1).run(None, x)[0], plain)


def test_a_table_beside_a_qdq_file_belongs_to_that_file(box, done):
    done("quantize m.onnx --ranges r.json --multipliers t.json -o q.onnx")
    assert (box / "q.onnx").read_bytes() == (box / "int8.onnx").read_bytes(), "the file is what it is without a table"
    quantized = load_model(box / "q.onnx")
    table = load_table(box / "t.json", quantized)
    codes = {name for node in quantized.graph.node for name in node.output}
    for entry in table["entries"]:
        assert all(grid["tensor"] in codes for grid in entry["inputs"]), "tensors are named as in the file"


def test_an_engine_is_built_of_integer_operators(box, done):
    done("quantize m.onnx --ranges r.json --format qoperator -o q.onnx")
    done("build-engine q.onnx --target ort --require-int8 -o e2.onnx")
    audit = json.loads((box / "e2.onnx.json").read_text())["audit"]
    assert [layer["precision"] for layer in audit["linear"]] == ["int8"] * 6
    assert {layer["name"] for layer in audit["linear"]} == {
        "stem", "block.conv1", "block.conv2", "depthwise", "fuse", "fc",
    }  # fmt: skip
    assert audit["islands"] == []
    assert audit["activations"] == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"quantize m.onnx --ranges r.json --target {RTX} --format qoperator -o old.out", "its parser takes Q/DQ"),
        (f"quantize m.onnx --ranges r.json --target {RTX} --multipliers t.json -o old.out", "no output scale"),
        ("quantize m.onnx --ranges r.json --multipliers old.out -o old.out", "another output too"),
        ("quantize m.onnx --ranges r.json --multipliers r.json -o old.out", "also an input"),
        ("quantize m.onnx --ranges r.json --multipliers no/t.json -o old.out", "is not a folder"),
        ("quantize m.onnx --ranges r.json --format qlinear -o old.out", "'qlinear' is not one of"),
    ],
)
def test_what_is_refused_changes_nothing(refused, command, says):
    refused(command, says=says)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_integer_operators_are_refused_as_input(box, done, refused, form):
    done(f"quantize m.onnx --ranges r.json --format {form} -o q.onnx")
    refused("quantize q.onnx --ranges r.json -o old.out", says="the model is quantised already")
    refused("calibrate q.onnx --calib x.npy -o old.out", says="the model is quantised already")


def test_two_runs_write_the_same_bytes(box, done):
    for number in (1, 2):
        done(f"quantize m.onnx --ranges r.json --format qoperator --multipliers t{number}.json -o q{number}.onnx")
    assert (box / "q1.onnx").read_bytes() == (box / "q2.onnx").read_bytes()
    assert (box / "t1.json").read_bytes() == (box / "t2.json").read_bytes()
    onnx.checker.check_model(onnx.load(box / "q1.onnx"))
