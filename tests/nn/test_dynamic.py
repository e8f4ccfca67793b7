from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.dynamic import DyReLU  # noqa: E402

pytestmark = pytest.mark.torch

LAYOUTS = [
    pytest.param(1, (3, 4), id="NC"),
    pytest.param(1, (2, 4, 5), id="NCL"),
    pytest.param(1, (2, 4, 3, 2), id="NCHW"),
    pytest.param(1, (2, 4, 2, 3, 2), id="NCDHW"),
    pytest.param(-1, (2, 5, 4), id="NTC"),
    pytest.param(-1, (2, 3, 2, 4), id="NHWC"),
]
VARIANTS = ["A", "B", "C"]


def trained(variant: str, axis: int = 1, *, channels: int = 4, pieces: int = 2, seed: int = 0, **options) -> DyReLU:
    """A float64 unit whose every parameter has left its start."""
    torch.manual_seed(seed)
    unit = DyReLU(channels, variant, channel_axis=axis, pieces=pieces, reduction=2, **options).double()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return unit


def by_the_paper(unit: DyReLU, x: np.ndarray) -> np.ndarray:
    """Equations 1, 2, 4 and 5 for channels-last numpy: every a, b and pi written out."""
    p = {name: value.detach().numpy() for name, value in unit.named_parameters()}
    n, c, k = x.shape[0], unit.channels, unit.pieces
    flat = x.reshape(n, -1, c)
    y = np.empty_like(flat)
    for i in range(n):
        hidden = np.maximum(p["squeeze.weight"] @ flat[i].mean(0) + p["squeeze.bias"], 0)
        theta = 2 / (1 + np.exp(-(p["excite.weight"] @ hidden + p["excite.bias"]))) - 1
        da, db = theta.reshape(2, k, -1)
        a = np.array([1.0] + [0.0] * (k - 1))[:, None] + unit.lambda_a * da
        b = unit.lambda_b * db
        pi = np.ones(flat.shape[1])
        if unit.variant == "C":
            z = np.exp(flat[i] @ p["attention.weight"][0] / 10)
            pi = np.minimum(flat.shape[1] / 3 * z / z.sum(), 1)
        for t in range(flat.shape[1]):
            y[i, t] = (pi[t] * a * flat[i, t] + pi[t] * b).max(0)
    return y.reshape(x.shape)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize(("axis", "shape"), LAYOUTS)
def test_values_are_those_of_the_paper(variant, pieces, axis, shape):
    unit = trained(variant, axis, pieces=pieces)
    x = 3 * torch.randn(shape, dtype=torch.float64)
    want = by_the_paper(unit, x.movedim(axis, -1).numpy())
    np.testing.assert_allclose(unit(x).detach().movedim(axis, -1), want, rtol=0, atol=1e-13)


def test_by_hand():
    # One channel, one hidden unit: pool 2, hidden relu(2 - 1) = 1, every residual 2 sigmoid(ln 3) - 1 = 1/2.
    unit = DyReLU(1, "B")
    assert unit.squeeze.weight.shape == (1, 1)
    with torch.no_grad():
        unit.squeeze.weight.fill_(1.0)
        unit.squeeze.bias.fill_(-1.0)
        unit.excite.weight.fill_(np.log(3.0))
    x = torch.tensor([[[0.0, 4.0, -4.0, 8.0]]])
    slopes, offsets = unit.coefficients(x)
    torch.testing.assert_close(slopes, torch.tensor([[[1.5], [0.5]]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(offsets, torch.tensor([[[0.25], [0.25]]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(unit(x), torch.tensor([[[0.25, 6.25, -1.75, 12.25]]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("axis", "shape"), LAYOUTS)
def test_a_fresh_unit_is_relu(axis, shape):
    x = torch.randn(shape)
    for variant in ("A", "B"):
        assert torch.equal(DyReLU(4, variant, channel_axis=axis)(x), torch.relu(x))
    unit = DyReLU(4, "C", channel_axis=axis)
    torch.testing.assert_close(unit(x), torch.relu(x) * unit.attend(x))
    with torch.no_grad():
        unit.attention.weight.zero_()
    torch.testing.assert_close(unit(x), torch.relu(x) / 3)


def test_without_a_range_it_is_relu_whatever_the_network():
    unit = trained("B", lambda_a=0.0, lambda_b=0.0)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(unit(x), torch.relu(x))


def test_a_third_function_starts_near_relu_and_parts_from_the_second():
    torch.manual_seed(0)
    unit = DyReLU(8, pieces=3)
    x = torch.randn(16, 8, 5, 5)
    assert (unit(x) - torch.relu(x)).abs().max() < 0.1
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (unit(x) - x.abs() / 2).square().mean().backward()
        optimizer.step()
    slopes, _ = unit.coefficients(x)
    assert (slopes[:, 1] - slopes[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_learns_from_the_second_step(variant):
    torch.manual_seed(0)
    unit = DyReLU(8, variant)
    before = {name: parameter.detach().clone() for name, parameter in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    x = torch.randn(4, 8, 3, 3)
    for _ in range(2):
        optimizer.zero_grad()
        (unit(x) - x.abs()).square().mean().backward()
        assert all(parameter.grad is not None for parameter in unit.parameters())
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in unit.named_parameters())


def test_attention_has_mean_a_third_and_is_cut_at_one():
    unit = trained("C")
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    flat = unit.attend(x)
    assert flat.shape == (3, 1, 6, 6)
    torch.testing.assert_close(flat.mean((1, 2, 3)), torch.full((3,), 1 / 3, dtype=torch.float64))
    x[:, :, 0, 0] = 1000 * unit.attention.weight[0].detach().sign()
    steep = unit.attend(x)
    assert steep.max() == 1
    assert steep.min() >= 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("axis", "shape"), LAYOUTS)
def test_gradcheck_of_input_and_parameters(variant, axis, shape):
    unit = trained(variant, axis, pieces=3, seed=1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in unit.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *unit.parameters()), fast_mode=True)


def test_a_sample_does_not_depend_on_its_batch():
    unit = trained("C")
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(unit(x)[1:2], unit(x[1:2]), rtol=0, atol=1e-14)


def test_parameters_a_channel():
    # DY-ReLU, table 2: C^2/R, then 2 K C^2/R or 2 K C/R, with biases.
    count = {v: sum(p.numel() for p in DyReLU(64, v).parameters()) for v in VARIANTS}
    assert count["A"] == 64 * 8 + 8 + 4 * 8 + 4
    assert count["B"] == 64 * 8 + 8 + 256 * 8 + 256
    assert count["C"] == count["B"] + 64
    assert [DyReLU(c).squeeze.out_features for c in (3, 16, 40)] == [3, 4, 5]


def test_reset_goes_back_to_relu():
    unit = trained("B")
    unit.reset_parameters()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(unit(x), torch.relu(x))


def test_an_empty_batch_passes():
    assert DyReLU(4, "C")(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyReLU(4, "D"), "no DY-ReLU 'D'"),
        (lambda: DyReLU(0), "channels of DY-ReLU is 0"),
        (lambda: DyReLU(4, pieces=0), "pieces of DY-ReLU is 0"),
        (lambda: DyReLU(4, reduction=0), "reduction is 0"),
        (lambda: DyReLU(4, lambda_a=-1.0), "ranges of DY-ReLU are -1.0"),
        (lambda: DyReLU(4, lambda_b=float("nan")), "ranges of DY-ReLU are"),
        (lambda: DyReLU(4)(torch.zeros(2, 5)), r"4 channels on axis 1 got input of shape \(2, 5\)"),
        (lambda: DyReLU(4)(torch.zeros(4)), "got input of shape"),
        (lambda: DyReLU(4, channel_axis=-1)(torch.zeros(4)), "axis 0 is the batch"),
        (lambda: DyReLU(4)(torch.zeros(2, 4, dtype=torch.int64)), "int64 input"),
        (lambda: DyReLU(4, "B").attend(torch.zeros(2, 4)), "B has no attention"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_two_steps_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        units = [DyReLU(4, variant, pieces=3) for variant in VARIANTS]
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), *units))
        for _ in range(2):  # a parameter without a gradient is an error in the second step
            model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
