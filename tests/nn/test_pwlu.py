from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.export.run import export_model  # noqa: E402
from relu_deploy.export.specs import DynamicAxis, parse_input  # noqa: E402
from relu_deploy.nn.pwlu import PWLU, StaticPWLU  # noqa: E402

pytestmark = pytest.mark.torch

LAYOUTS = [
    pytest.param(3, 1, (4, 3), id="NC"),
    pytest.param(3, 1, (2, 3, 4, 5), id="NCHW"),
    pytest.param(3, -1, (2, 4, 3), id="NTC"),
    pytest.param(None, 1, (2, 4, 3), id="layer"),
]


def trained(channels: int | None = 3, axis: int = 1, *, intervals: int = 16) -> PWLU:
    """A unit whose every parameter has left its start."""
    torch.manual_seed(0)
    unit = PWLU(channels, intervals=intervals, channel_axis=axis)
    with torch.no_grad():
        for tensor in unit.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return unit


def columns(*values: list[float]) -> torch.Tensor:
    """Channels given one after the other, as (N, C)."""
    return torch.tensor(values).t().contiguous()


# The start


def test_starts_as_relu_exactly_with_even_intervals():
    x = torch.cat((torch.linspace(-6, 6, 1001), torch.tensor([0.0, 1e-30, 1e30]))).unsqueeze(1)
    y = PWLU(1)(x)
    # Slopes of 1 between heights that are rounded: a few eps of the height.
    np.testing.assert_allclose(y.detach(), F.relu(x), rtol=1e-6, atol=1e-6)
    odd = PWLU(1, intervals=15)(x) - F.relu(x)
    assert odd[500].item() == pytest.approx(3 / 30)  # at 0
    assert odd[:1001].argmax().item() == 500


def test_from_function_meets_the_function_and_continues_its_slopes():
    unit = PWLU.from_function(F.silu, -6.0, 6.0, channels=2, intervals=12)
    points = torch.arange(-6.0, 7.0)
    np.testing.assert_allclose(
        unit(columns(points.tolist(), points.tolist()))[:, 1].detach(), F.silu(points), atol=1e-6
    )
    low, high = F.silu(torch.tensor([-7.0, -6.0])).diff(), F.silu(torch.tensor([6.0, 7.0])).diff()
    np.testing.assert_allclose(unit.slope_left.detach(), low.expand(2), atol=1e-6)
    np.testing.assert_allclose(unit.slope_right.detach(), high.expand(2), atol=1e-6)


@pytest.mark.parametrize(
    ("function", "low", "high", "match"),
    [
        (F.silu, 1.0, 1.0, r"cannot span \[1.0, 1.0\] with 16 intervals"),
        (F.silu, -math.inf, 1.0, "cannot span"),
        (torch.log, -1.0, 1.0, r"not elementwise and finite on \[-1.125, 1.125\]"),
        (lambda x: x.sum(), -1.0, 1.0, "not elementwise"),
    ],
)
def test_from_function_refuses(function, low, high, match):
    with pytest.raises(TrainingError, match=match):
        PWLU.from_function(function, low, high)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channels": 0}, "PWLU over 0 channels"),
        ({"intervals": 0}, "PWLU with 0 intervals"),
        ({"bound": 0.0}, r"boundaries at -\+0.0"),
        ({"bound": math.nan}, r"boundaries at -\+nan"),
        ({"bound": 0.007}, r"boundaries at -\+0.007"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(TrainingError, match=match) as caught:
        PWLU(**arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("x", "axis", "match"),
    [
        (torch.zeros(2, 4), 1, r"3 channels on axis 1 got input of shape \(2, 4\)"),
        (torch.zeros(3), 1, r"got input of shape \(3,\)"),
        (torch.zeros(2, 3, 4), -1, r"axis -1 got input of shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), 1, "PWLU got torch.int64 input"),
    ],
)
def test_inputs_that_do_not_fit(x, axis, match):
    unit = PWLU(3, channel_axis=axis)
    for module in (unit, unit.to_static()):
        with pytest.raises(TrainingError, match=match):
            module(x)


# Realignment


def test_phase_one_is_relu_with_running_statistics_and_zero_gradients():
    unit = trained(2)
    unit.collect()
    assert unit.collecting
    first = columns([0.0, 2.0], [1.0, 1.0]).requires_grad_()  # means 1, 1; population stds 1, 0
    y = unit(first)
    assert torch.equal(y, F.relu(first))
    y.sum().backward()
    assert first.grad.tolist() == [[0.0, 1.0], [1.0, 1.0]]  # ReLU's, 0 at 0
    assert all(p.grad is not None and not p.grad.any() for p in unit.parameters())
    assert (unit.mean.tolist(), unit.std.tolist()) == ([1.0, 1.0], [1.0, 0.0])
    unit(columns([5.0, 9.0], [-1.0, -3.0]))  # means 7, -2; stds 2, 1
    np.testing.assert_allclose(unit.mean, [0.9 * 1 + 0.1 * 7, 0.9 * 1 - 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(unit.std, [0.9 * 1 + 0.1 * 2, 0.1], rtol=1e-6)
    assert unit.batches.tolist() == [2, 2]
    before = copy.deepcopy(unit.state_dict())
    unit.eval()
    assert torch.equal(unit(first), F.relu(first))
    assert all(torch.equal(value, before[name]) for name, value in unit.state_dict().items())


def test_realign_puts_the_boundaries_three_standard_deviations_from_the_mean():
    unit = trained(4)
    unit.collect()
    nan = math.nan
    unit(columns([0.0, 2.0], [5.0, 5.0], [nan, 1.0], [-1.0, -5.0]))
    assert unit.batches.tolist() == [1, 1, 0, 1]  # the batch that is not finite is left out, in that channel
    unit.realign()
    assert not unit.collecting
    # mean -+ 3 std; the dead channel mean -+ bound; the one never seen as it was; the last beyond 0.
    assert unit.left.tolist() == [-2.0, 2.0, -3.0, -9.0]
    assert unit.right.tolist() == [4.0, 8.0, 3.0, 3.0]
    assert (unit.slope_left.tolist(), unit.slope_right.tolist()) == ([0.0] * 4, [1.0] * 4)
    points = unit.left.unsqueeze(1) + (unit.right - unit.left).unsqueeze(1) * torch.arange(17) / 16
    np.testing.assert_allclose(unit.values.detach(), F.relu(points.detach()), atol=1e-6)
    unit(10 * torch.randn(64, 4)).sum().backward()  # on both sides of every boundary
    assert all(p.grad.any() for p in unit.parameters())


def test_an_empty_batch_and_one_that_is_not_finite_leave_the_statistics():
    unit = PWLU(2)
    unit.collect()
    unit(columns([0.0, 2.0], [1.0, 3.0]))
    before = copy.deepcopy(unit.state_dict())
    unit(torch.zeros(0, 2))
    unit(columns([math.inf, 2.0], [math.nan, 3.0]))
    assert all(torch.equal(value, before[name]) for name, value in unit.state_dict().items())


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_statistics_in_every_layout(channels, axis, shape):
    unit = PWLU(channels, channel_axis=axis)
    unit.collect()
    x = 3 * torch.randn(shape) + 1
    unit(x)
    flat = x.reshape(1, -1) if channels is None else x.movedim(axis, 0).flatten(1)
    np.testing.assert_allclose(unit.mean, flat.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unit.std, flat.numpy().std(1), rtol=1e-5)


def test_intersection_over_union():
    unit = PWLU(4, bound=3.0)
    mean, std = torch.tensor([0.0, 0.0, 10.0, 3.0]), torch.tensor([1.0, 2.0, 1.0, 1.0])
    # [-3, 3] with itself, with [-6, 6], with [7, 13], with [0, 6].
    np.testing.assert_allclose(unit.iou(mean, std), [1.0, 0.5, 0.0, 3 / 9], rtol=1e-12)
    unit.collect()
    unit(torch.randn(4096, 4) + 2)
    assert (unit.iou() < 0.9).all()
    unit.realign()
    np.testing.assert_allclose(unit.iou(), 1.0, rtol=1e-6)


def test_crossed_boundaries_act_at_the_smallest_width_and_part_again():
    unit = PWLU(2, intervals=4)
    with torch.no_grad():
        unit.left[0], unit.right[0] = 0.5, -0.5
    assert unit.crossed().tolist() == [True, False]
    assert "1 with crossed boundaries" in repr(unit)
    x = torch.tensor([[0.502, 0.0], [-4.0, 0.0], [9.0, 0.0]])  # in the middle of [0.5, 0.504], and on either side
    y = unit(x)
    assert y.isfinite().all()
    # Heights are still those of [-3, 3]: 0, 0, 0, 1.5, 3; the right slope is 1 from there.
    np.testing.assert_allclose(y[:, 0].detach(), [0.0, 0.0, 3 + 9 - 0.504], atol=1e-4)
    y.sum().backward()
    # The boundaries feel their gradients: -K_R = -1 of the sample beyond, and half of -K_2 = -1.5 / 0.001.
    assert unit.right.grad[0].item() == pytest.approx(-751, rel=1e-3)
    assert "crossed" not in repr(PWLU(2))


# State


@pytest.mark.parametrize("collecting", [False, True])
def test_state_goes_through_state_dict_deepcopy_and_pickle(collecting):
    unit = trained(3)
    if collecting:
        unit.collect()
        unit(torch.randn(8, 3))
    loaded = PWLU(3)
    loaded.load_state_dict(unit.state_dict())
    buffer = io.BytesIO()
    torch.save(unit, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(16, 3)
    results = []
    for module in (unit, loaded, copy.deepcopy(unit), again):
        assert module.collecting is collecting
        results.append(module(x).detach())
        if collecting:
            module.realign()
        results.append(module(x).detach())
    assert all(torch.equal(a, b) for a, b in zip(results[2:], results[:2] * 3, strict=True))
    if collecting:
        fresh = PWLU(3)
        fresh.collect()
        fresh.load_state_dict(PWLU(3).state_dict())
        assert not fresh.collecting


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_static_form_is_bit_identical(channels, axis, shape):
    unit = trained(channels, axis)
    static = unit.to_static()
    x = 4 * torch.randn(shape)
    assert torch.equal(static(x), unit(x))
    assert torch.equal(static(x.clone().requires_grad_()), unit(x))
    assert not list(static.parameters())
    loaded = PWLU(channels, channel_axis=axis).to_static()
    loaded.load_state_dict(static.state_dict())
    assert torch.equal(loaded(x), static(x))
    slopes, offsets = unit.tables()
    assert torch.equal(static.slopes, slopes)
    assert torch.equal(static.offsets, offsets)


def test_static_form_follows_no_later_change_and_gives_gradients_to_its_input():
    unit = trained()
    static, x = unit.to_static(), (4 * torch.randn(5, 3)).requires_grad_()
    (want,) = torch.autograd.grad(unit(x).sum(), x)
    (got,) = torch.autograd.grad(static(x).sum(), x)
    assert torch.equal(got, want)
    before = static(x)
    with torch.no_grad():
        unit.values.zero_()
        unit.left.zero_()
    assert torch.equal(static(x), before)


def test_static_form_in_phase_one_is_relu():
    unit = trained()
    unit.collect()
    x = 4 * torch.randn(64, 3)
    np.testing.assert_allclose(unit.to_static()(x), F.relu(x), rtol=1e-6, atol=1e-6)


# Precision, compilers, exporters, processes


def test_half_precision_and_autocast():
    unit = trained(4)
    x = 3 * torch.randn(8, 4, 5)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        y = unit(low)
        assert y.dtype == dtype
        # Arithmetic is float32, rounded once.
        assert torch.equal(y, unit(low.float()).to(dtype))
    half = copy.deepcopy(unit).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(4, 4), PWLU(4, channel_axis=-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(6, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_collecting_in_half_precision_keeps_float32_statistics():
    unit = PWLU(1)
    unit.collect()
    unit(torch.full((4096, 1), 0.1, dtype=torch.bfloat16))
    assert unit.mean.dtype == torch.float32
    assert unit.mean.item() == pytest.approx(0.1, rel=5e-3)  # 0.1 in bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    unit = trained(3)
    x, upstream = 3 * torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.compiler.reset()
    compiled = torch.compile(unit, backend=backend, fullgraph=True)
    want = torch.autograd.grad(unit(x), list(unit.parameters()), upstream)
    y = compiled(x)
    got = torch.autograd.grad(y, list(unit.parameters()), upstream)
    # Inductor may fuse a product and a sum.
    np.testing.assert_allclose(y.detach(), unit(x).detach(), atol=1e-5)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if backend == "aot_eager":
        with torch.no_grad():
            assert torch.equal(torch.compile(unit.eval(), backend=backend, fullgraph=True)(x), unit(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside dynamo
def test_phase_one_compiles_too():
    unit = PWLU(3)
    unit.collect()
    torch.compiler.reset()
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3)
    assert torch.equal(compiled(x), F.relu(x))
    assert unit.batches.tolist() == [1, 1, 1]
    unit.realign()
    np.testing.assert_allclose(compiled(x).detach(), unit(x).detach(), atol=1e-6)


@pytest.mark.parametrize("kind", ["trained", "static", "collecting"])
def test_torch_export(kind):
    unit = trained(3).eval()
    if kind == "collecting":
        unit.collect()
    module = unit.to_static() if kind == "static" else unit
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.randn(2, 3, 4),), dynamic_shapes=({0: batch},))
    x = 3 * torch.randn(5, 3, 4)
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("kind", "exporter", "opset"),
    [
        ("trained", "torchscript", 18),
        ("trained", "dynamo", 20),
        ("static", "torchscript", 18),
        ("static", "dynamo", 18),
        ("collecting", "dynamo", 20),
    ],
)
def test_onnx_export(kind, exporter, opset, tmp_path):
    unit = trained(3)
    if kind == "collecting":
        unit.collect()
    axes = nn.Sequential(unit, trained(4, -1), trained(None))  # (N, 3, 5, 4)
    model = nn.Sequential(*(module.to_static() for module in axes)) if kind == "static" else axes
    path = tmp_path / "pwlu.onnx"
    # Compares ONNX Runtime with torch at several batch sizes.
    export_model(
        model, [parse_input("x=2x3x5x4")], path, exporter=exporter, opset=opset,
        dynamic=[DynamicAxis("x", 0, 1, 9)],
    )  # fmt: skip
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds == ["Relu" if kind == "collecting" else "PWLU", "PWLU", "PWLU"]
    x = 3 * torch.randn(4, 3, 5, 4)
    x[1, 2, 3, 1] = math.nan
    (got,) = ort.InferenceSession(path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, model.eval()(x).detach(), rtol=1e-5, atol=1e-5)
    assert np.argwhere(np.isnan(got)).tolist() == [[1, 2, 3, 1]]


WORKER = """
import json, os, sys, torch
from pathlib import Path
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from relu_deploy.nn.pwlu import PWLU
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), PWLU(2)), broadcast_buffers=False)
unit = model.module[1]
unit.collect()
# Process 0 sees 0 and 2, process 1 sees 8 and 14; its second channel only ever sees NaN.
model(torch.randn(4, 2)).sum().backward()
gone = [bool((p.grad == 0).all()) for p in unit.parameters()]
for statistic in (unit.mean, unit.std, unit.batches):
    statistic.zero_()
nan = float("nan")
unit(torch.tensor([[0.0, 1.0], [2.0, 3.0]] if rank == 0 else [[8.0, nan], [14.0, nan]]))
unit.realign()
model(torch.randn(4, 2, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
grads = [p.grad.tolist() for p in unit.parameters()]
found = dict(left=unit.left.tolist(), right=unit.right.tolist(), mean=unit.mean.tolist(), std=unit.std.tolist(),
             batches=unit.batches.tolist(), gone=gone, grads=grads)
(folder / f"{rank}.json").write_text(json.dumps(found))
# Gloo's threads abort a process at times while it ends ("terminate called without an active exception").
os._exit(0)
"""


def test_two_processes_pool_their_statistics(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    other = subprocess.Popen([*command, "1"])
    try:
        subprocess.run([*command, "0"], check=True, timeout=120)
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert all(one["gone"])
    assert one["batches"] == [2, 1]
    # 0, 2, 8 and 14 together: mean 6, variance (36 + 16 + 4 + 64) / 4 = 30. The other channel: 1 and 3 alone.
    np.testing.assert_allclose(one["mean"], [6.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(one["std"], [30**0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(one["left"], [6 - 3 * 30**0.5, -1.0], rtol=1e-6)
    np.testing.assert_allclose(one["right"], [6 + 3 * 30**0.5, 5.0], rtol=1e-6)
    assert any(np.any(grad) for grad in one["grads"])


def test_what_print_shows():
    unit = PWLU(3, channel_axis=-1)
    assert repr(unit) == "PWLU(3, channel_axis=-1, intervals=16)"
    unit.collect()
    assert repr(unit) == "PWLU(3, channel_axis=-1, intervals=16, collecting)"
    assert repr(PWLU(intervals=4).to_static()) == "StaticPWLU(layer-wise, intervals=4)"
    assert isinstance(unit.to_static(), StaticPWLU)
