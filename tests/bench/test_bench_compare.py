from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from relu_deploy.bench.compare import bench
from relu_deploy.bench.measure import draw_order
from relu_deploy.bench.report import HIGH_VARIATION, Noise, find_warnings
from relu_deploy.bench.subject import read_subject
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.engines.manifest import manifest_path
from relu_deploy.errors import BackendUnavailableError, DataError, EngineError, FileError, ModelError
from relu_deploy.report import to_json

Save = Callable[[str, onnx.ModelProto], Path]
Chain = Callable[..., onnx.ModelProto]
Classifier = Callable[[str, str], Path]
QUICK = {"seconds": 0.2, "rounds": 6, "warmup": 0.0, "threads": 1}


def test_twenty_times_the_work_is_called_slower(save: Save, chain: Chain) -> None:
    original, slow = save("original.onnx", chain(3)), save("slow.onnx", chain(60))
    report = bench([slow], against=original, seconds=0.6, rounds=12, warmup=0.05, threads=1)
    found = report.engines[0].ratio
    assert found is not None
    assert found.verdict == "slower"
    # 20 times the work, less what a call costs by itself: far from 1 in either case.
    assert found.value < 0.5
    assert report.engines[0].throughput < report.original.throughput


def test_a_file_against_itself_is_not_called_different(save: Save, chain: Chain) -> None:
    path = save("same.onnx", chain(5))
    verdicts = []
    for seed in range(8):
        report = bench([path], against=path, seconds=0.5, rounds=12, warmup=0.05, threads=1, seed=seed)
        assert [report.original.name, report.engines[0].name] == ["same.onnx", "same.onnx (2)"]
        assert report.engines[0].ratio is not None
        verdicts.append(report.engines[0].ratio.verdict)
        if verdicts[-1] == "not distinguishable":
            break
    # Each comparison errs with a probability of 5 to 8 % on a quiet machine; a neighbour that comes and goes makes runs
    # of errors likelier, so three were not enough in practice. A bias would fail all eight.
    assert "not distinguishable" in verdicts


def test_the_report_keeps_everything_needed_to_make_it_again(save: Save, chain: Chain) -> None:
    a, b = save("a.onnx", chain(2)), save("b.onnx", chain(2))
    report = bench([b], against=a, batch=2, seed=5, **QUICK)
    stored = json.loads(json.dumps(to_json(report), allow_nan=False))
    for result in (stored["original"], *stored["engines"]):
        raw = result["raw"]
        assert len(raw["warmup"]) >= 3
        assert len(raw["settle"]) == len(raw["rounds"]) == 6
        counted = np.concatenate(raw["rounds"])
        assert result["samples"] == len(counted)
        assert result["median_ms"] == pytest.approx(np.median(counted) / 1e6, rel=1e-12)  # the unit's rounding
        assert result["throughput"] == pytest.approx(2 / np.median(counted) * 1e9, rel=1e-12)
        assert result["peak_bytes"] > 0
    ratios = [
        np.median(x) / np.median(y)
        for x, y in zip(*(s["raw"]["rounds"] for s in (stored["original"], stored["engines"][0])), strict=True)
    ]
    assert stored["engines"][0]["ratio"]["value"] == pytest.approx(np.median(ratios), rel=1e-12)
    assert stored["original"]["ratio"] is None
    assert stored["order"] == [list(turn) for turn in draw_order(2, 6, seed=5)]
    assert stored["settings"]["batch"] == 2
    assert stored["unit"] == "FPS"
    assert stored["inputs"] == [{"name": "x", "shape": [2, 3, 16, 16], "dtype": "float32"}]
    assert stored["machine"]["packages"]["onnxruntime"]
    assert stored["noise"]["load_before"] is not None


def test_percentiles_beyond_the_sample_are_refused(save: Save, chain: Chain) -> None:
    path = save("a.onnx", chain(200))
    report = bench([path], against=path, seconds=0.01, rounds=6, warmup=0, threads=1, percentiles=(50, 99.9))
    median, extreme = report.original.percentiles
    assert median.value == pytest.approx(report.original.median_ms, rel=1)  # nearest rank against the interpolated one
    assert (extreme.value, extreme.needed) == (None, 3688)


def test_order_gives_every_engine_every_place() -> None:
    order = np.array(draw_order(3, 60, seed=0))
    assert (np.sort(order, axis=1) == [0, 1, 2]).all()
    assert all(len(set(order[:, place])) == 3 for place in range(3))


def test_accuracy_with_labels(classifier: Classifier, tmp_path: Path) -> None:
    original, engine = classifier("o.onnx", "Identity(x)"), classifier("e.onnx", "Neg(x)")
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
    labels = np.array([0, 1, 2, 3, 1])  # the last is wrong for the original
    np.save(tmp_path / "labels.npy", labels)
    report = bench([engine], against=original, data=x, labels=tmp_path / "labels.npy", batch=2, **QUICK)
    before, after = report.original.accuracy, report.engines[0].accuracy
    assert before is not None
    assert after is not None
    assert (before.samples, before.top1, before.lost, before.sqnr_db) == (5, 0.8, None, None)
    # -x has its largest score at the first zero: class 0, or class 1 where x is class 0.
    assert after.top1 == np.mean(np.argmax(-x, 1) == labels)
    assert (after.lost, after.gained) == (4, 1)
    assert after.output == "scores"


def test_accuracy_without_labels_compares_outputs(classifier: Classifier, tmp_path: Path) -> None:
    original, engine = classifier("o.onnx", "Identity(x)"), classifier("e.onnx", "Add(x, x)")
    np.savez(tmp_path / "d.npz", x=np.arange(12, dtype=np.float32).reshape(3, 4))
    report = bench([engine], against=original, data=tmp_path / "d.npz", batch=2, output="total", **QUICK)
    found = report.engines[0].accuracy
    assert found is not None
    # The error is as large as the signal, 0 dB; rows sum to 6, 22 and 38.
    assert (found.sqnr_db, found.max_abs_error, found.agreement) == (0.0, 38.0, None)


@pytest.mark.parametrize("labels", [3, 6])
def test_labels_of_another_number_than_samples(classifier: Classifier, labels: int, tmp_path: Path) -> None:
    model, x, truth = classifier("o.onnx", "Identity(x)"), np.eye(4, dtype=np.float32), np.zeros(labels, int)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=f"{labels} labels for 4 samples"):
        bench([model], against=model, data=tmp_path / "x.npy", labels=truth, **QUICK)
    # Of a function the length is known only at its end.
    with pytest.raises(DataError, match=r"only 3 labels|6 labels for 4 samples"):
        bench([model], against=model, data=lambda: list(x), labels=truth, **QUICK)


def test_engines_are_opened_with_their_manifest(save: Save, chain: Chain, tmp_path: Path) -> None:
    original, engine = save("o.onnx", chain(3)), tmp_path / "built" / "o.onnx"
    engine.parent.mkdir()
    get_backend("ort").build(original, engine, BuildConfig(target="ort"))
    report = bench([engine], against=original, **QUICK)
    assert [report.original.target, report.engines[0].target] == ["onnx", "ort"]
    assert report.engines[0].name == "built/o.onnx"
    engine.write_bytes(engine.read_bytes() + b"\0")
    with pytest.raises(EngineError, match="damaged, cut short or stale"):
        bench([engine], against=original, **QUICK)


def test_a_report_beside_a_plain_file_is_no_manifest(save: Save, chain: Chain) -> None:
    model = save("m.onnx", chain(1))
    (model.parent / "m.onnx.json").write_text('{"changed": []}')
    assert read_subject(model).target == "onnx"
    (model.parent / "m.onnx.json").write_text('{"sha256": ')
    with pytest.raises(FileError, match="not valid JSON"):
        read_subject(model)


def test_an_engine_for_a_card_needs_one(save: Save, chain: Chain, tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a CUDA driver")
    original, engine = save("o.onnx", chain(1)), tmp_path / "card.engine"
    get_backend("ort").build(original, engine, BuildConfig(target="ort"))
    manifest = manifest_path(engine)
    manifest.write_text(manifest.read_text().replace('"target": "ort"', '"target": "tensorrt-rtx"'))
    # Measuring would take days: it is refused before.
    with pytest.raises(BackendUnavailableError, match=r"card\.engine.* needs an NVIDIA GPU") as caught:
        bench([engine], against=original, seconds=1e6)
    assert caught.value.exit_code == 2


def test_other_outputs_are_warned_of_and_refused_with_data(classifier: Classifier, save: Save, chain: Chain) -> None:
    original = classifier("o.onnx", "Identity(x)")
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] z) { z = Neg(x) }'
    )
    engine = save("z.onnx", other)
    report = bench([engine], against=original, **QUICK)
    assert any("z.onnx: its outputs are not those" in warning for warning in report.warnings)
    with pytest.raises(DataError, match=r"z\.onnx has no output 'scores'.* it has z"):
        bench([engine], against=original, data=np.eye(4, dtype=np.float32), **QUICK)


def test_what_is_wrong_is_found_before_anything_is_measured(
    save: Save, chain: Chain, classifier: Classifier, tmp_path: Path
) -> None:
    model = save("a.onnx", chain(2))
    hours = {"seconds": 1e6, "rounds": 6}
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.read_bytes()[:-9])
    plan = tmp_path / "card.engine"
    plan.write_bytes(b"ptrt")
    cases: list[tuple[type[Exception], str, dict]] = [
        (FileError, r"none\.onnx: it does not exist", {"engines": [tmp_path / "none.onnx"]}),
        (FileError, "it is a folder", {"engines": [tmp_path]}),
        (ModelError, r"broken\.onnx", {"engines": [broken]}),
        (EngineError, r"card\.engine is no ONNX file", {"engines": [plan]}),
        (DataError, r"c\.onnx: its inputs|c\.onnx: its input", {"engines": [classifier("c.onnx", "Identity(x)")]}),
        (DataError, "no engine to measure", {"engines": []}),
        (DataError, "without data", {"labels": np.zeros(1, int)}),
        (DataError, "rounds must be at least 1", {"rounds": 0}),
        (DataError, "between 0 and 100", {"percentiles": (100,)}),
        (DataError, "seconds must be above 0", {"seconds": 0}),
        (DataError, "threads must be at least 1", {"threads": 0}),
        (DataError, "does not exist", {"data": tmp_path / "none.npy"}),
        (
            DataError,
            "cannot read the labels",
            {"data": np.zeros((1, 3, 16, 16), np.float32), "labels": tmp_path / "l.npy"},
        ),
    ]
    for kind, told, changed in cases:
        arguments = {"engines": [model], "against": model, **hours, **changed}
        with pytest.raises(kind, match=told):
            bench(arguments.pop("engines"), **arguments)


def test_dynamic_axes_must_be_given_or_come_from_data(save: Save, chain: Chain) -> None:
    model = save("a.onnx", chain(2, shape="N, 3, H, W"))
    with pytest.raises(DataError, match=r"--shape x=1x3xNxN"):
        bench([model], against=model, **QUICK)
    assert bench([model], against=model, shapes={"x": (2, 3, 4, 6)}, **QUICK).inputs[0].shape == (2, 3, 4, 6)
    data = np.zeros((3, 3, 5, 7), np.float32)
    assert bench([model], against=model, data=data, **QUICK).inputs[0].shape == (1, 3, 5, 7)


def test_external_data_counts_as_size(save: Save, tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 64]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    subject = read_subject(tmp_path / "e.onnx")
    assert subject.size_bytes >= 64 * 64 * 4
    assert subject.precision == "fp32"
    assert bench([tmp_path / "e.onnx"], against=tmp_path / "e.onnx", **QUICK).unit == "QPS"


def test_warnings_say_what_disturbs(save: Save, chain: Chain) -> None:
    model = save("a.onnx", chain(2))
    report = bench([model], against=model, **{**QUICK, "rounds": 3})
    quiet = dataclasses.replace(report.machine, logical_cpus=4, governor=None, flags=("avx2", "avx_vnni"))
    calm = dataclasses.replace(report.original, variation=0.01, precision="fp32")
    still = Noise(load_before=0, load_after=1, others=0.0, stolen=0.0)

    def warned(result=calm, noise=still, machine=quiet, threads=1) -> str:
        return " ".join(find_warnings([result], dataclasses.replace(report.settings, threads=threads), noise, machine))

    assert warned() == ""
    assert "machine was busy" in warned(noise=dataclasses.replace(still, others=0.5))
    assert "hypervisor" in warned(noise=dataclasses.replace(still, stolen=0.5))
    assert "5 threads share 4" in warned(threads=5)
    assert "powersave" in warned(machine=dataclasses.replace(quiet, governor="powersave"))
    assert "vary by" in warned(dataclasses.replace(calm, variation=HIGH_VARIATION * 1.1))
    int8 = dataclasses.replace(calm, precision="int8")
    assert warned(int8) == ""
    assert "no VNNI" in warned(int8, machine=dataclasses.replace(quiet, flags=("avx2",)))
    by_events = dataclasses.replace(calm, clock="engine")
    mixed = find_warnings([calm, by_events], report.settings, still, quiet)
    assert any("mixes two things" in warning for warning in mixed)
    assert any("3 rounds support no claim" in warning for warning in report.warnings)


@pytest.mark.models
def test_a_trained_detector_on_photographs(common_det: Path, photos: np.ndarray) -> None:
    report = bench([common_det], against=common_det, data=photos[:2], seconds=0.5, rounds=2, warmup=0)
    found = report.engines[0].accuracy
    assert found is not None
    assert (found.samples, found.max_abs_error) == (2, 0.0)  # the same file, on the same threads, is deterministic
    assert report.inputs[0].shape == (1, 3, 416, 416)
