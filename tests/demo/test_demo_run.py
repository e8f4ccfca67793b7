"""The demo from trained networks on: training itself is tested beside it, and the whole command by CI's first step."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from relu_deploy.cli import main
from relu_deploy.demo import run
from relu_deploy.demo.run import Network

pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[demo]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'relu-deploy[demo]'")
pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install 'relu-deploy[demo]'")

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 1, 32, 32] image) => (float[N, 10] logits)
{ a = Conv<strides=[2, 2]>(image, w1, b1) %s c = Conv<strides=[2, 2]>(r, w2) %s p = GlobalAveragePool(s) f = Flatten(p)
  logits = Gemm<transB=1>(f, w3) }"""
RELU = TEXT % ("r = Relu(a)", "s = Relu(c)")
SILU = TEXT % ("g1 = Sigmoid(a) r = Mul(a, g1)", "g2 = Sigmoid(c) s = Mul(c, g2)")


def small_networks(folder, digits, *, seed, progress):
    rng = np.random.default_rng(seed)
    weights = {"w1": (8, 1, 3, 3), "b1": (8,), "w2": (16, 8, 3, 3), "w3": (10, 16)}
    values = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in weights.items()}
    for name, text in (("original", SILU), ("student", RELU)):
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in values.items())
        onnx.save(model, folder / f"{name}.onnx")
        for end in ("safetensors", "metrics.jsonl", "training.png"):
            (folder / f"{name}.{end}").write_bytes(b"")
    return Network("original", "B", "SiLU", 0.1), Network("student", "B+KD", "ReLU", 0.1)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if tag == "a" and key == "href"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_train_and_export", small_networks)
        result = CliRunner().invoke(
            main, ["demo", "-o", str(folder), "--seconds", "0.3", "--json", str(folder.parent / "report.json")],
            terminal_width=150,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, result.output, json.loads((folder.parent / "report.json").read_text())


def test_prints_a_row_for_each_method_activation_and_precision(made):
    _, output, _ = made
    rows = re.findall(r"│ (B|B\+KD) +│ (SiLU|ReLU) +│ (FP32|INT8) +│ +(\d+) │", output)
    assert [row[:3] for row in rows] == [
        ("B", "SiLU", "FP32"), ("B", "SiLU", "INT8"), ("B+KD", "ReLU", "FP32"), ("B+KD", "ReLU", "INT8"),
    ]  # fmt: skip
    assert all(int(row[3]) > 0 for row in rows)
    assert "wrote" not in output
    assert "no GPU" in output or "tensorrt_rtx" in output


def test_page_links_to_every_file_it_made_and_to_no_other(made):
    folder, _, _ = made
    links = Links()
    links.feed((folder / "index.html").read_text())
    assert [link for link in links.found if not (folder / link).exists()] == []
    listed = set(links.found)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    covered = {path for path in on_disk if path in listed or any(path.startswith(f) for f in listed if f.endswith("/"))}
    assert on_disk - covered == {"README.md"}, "a file that the page does not explain"


def test_page_and_text_hold_the_same_figures(made):
    folder, _, report = made
    for name in ("index.html", "README.md"):
        text = (folder / name).read_text()
        for result in (report["speed"]["original"], *report["speed"]["engines"]):
            assert f"{result['throughput']:.0f}" in text
            assert f"{100 * result['accuracy']['top1']:.2f}" in text
        assert "{{" not in text


def test_report_has_what_the_table_rests_on(made):
    folder, _, report = made
    assert json.loads((folder / "demo.json").read_text())["builds"].keys() == report["builds"].keys()
    student = report["builds"]["student.int8.ort.onnx"]
    assert [layer["precision"] for layer in student["engine"]["audit"]["linear"]] == ["int8"] * 3
    assert len(student["quantize"]["dropped_activations"]) == 2
    assert student["engine"]["disagreements"] == []
    assert report["student_over_original"]["rounds"] == 20
    assert report["speed"]["original"]["accuracy"]["samples"] == 599


@pytest.mark.engine
def test_rtx_engines_are_built_where_the_package_is(made):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'relu-deploy[tensorrt-rtx]'")
    folder, _, report = made
    assert (folder / "student.int8.sm89.engine").is_file()
    assert report["without_rtx"] is None
    assert report["builds"]["student.int8.sm89.engine"]["engine"]["sm"] == ["89"]


def test_missing_torch_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "relu-deploy[demo]" in result.output
    assert not (tmp_path / "run").exists()
