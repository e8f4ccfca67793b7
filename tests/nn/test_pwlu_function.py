from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

from relu_deploy.nn.pwlu import PWLU  # noqa: E402
from relu_deploy.nn.pwlu_function import PWLUFunction, evaluate, tables_of  # noqa: E402

pytestmark = pytest.mark.torch

LAYOUTS = [
    pytest.param(3, 1, (4, 3), id="NC"),
    pytest.param(3, 1, (2, 3, 5), id="NCL"),
    pytest.param(3, 1, (2, 3, 4, 2), id="NCHW"),
    pytest.param(3, -1, (2, 4, 3), id="NTC"),
    pytest.param(None, 1, (2, 4, 3), id="layer"),
]


def trained(channels: int | None, axis: int = 1, *, intervals: int = 5, seed: int = 0) -> PWLU:
    """A float64 unit whose every parameter has left its start."""
    torch.manual_seed(seed)
    unit = PWLU(channels, intervals=intervals, channel_axis=axis).double()
    with torch.no_grad():
        for tensor in unit.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return unit


def by_the_paper(x: float, left: float, right: float, values: np.ndarray, low: float, high: float):
    """Value and gradients of one element as the paper's section 3.1 lists them: y, dx, dB_L, dB_R, dY, dK_L, dK_R."""
    n = len(values) - 1
    d = (right - left) / n
    dy = np.zeros(n + 1)
    if x < left:
        dy[0] = 1
        return (x - left) * low + values[0], low, -low, 0.0, dy, x - left, 0.0
    if x >= right:
        dy[n] = 1
        return (x - right) * high + values[n], high, 0.0, -high, dy, 0.0, x - right
    i = int(np.floor((x - left) / d))
    start = left + i * d
    slope = (values[i + 1] - values[i]) / d
    dy[i], dy[i + 1] = (start + d - x) / d, (x - start) / d
    outer = right - left
    y = (x - start) * slope + values[i]
    return y, slope, slope * (x - right) / outer, -slope * (x - left) / outer, dy, 0.0, 0.0


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_values_and_gradients_are_those_of_the_paper(channels, axis, shape):
    unit = trained(channels, axis)
    x = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    y = unit(x)
    y.backward(upstream)

    p = {name: value.detach().numpy() for name, value in unit.named_parameters()}
    want_y, want_x = np.zeros(shape), np.zeros(shape)
    want = {name: np.zeros_like(value) for name, value in p.items()}
    for place in np.ndindex(*shape):
        c = 0 if channels is None else place[axis]
        g = upstream[place].item()
        one = by_the_paper(
            x[place].item(), p["left"][c], p["right"][c], p["values"][c], p["slope_left"][c], p["slope_right"][c]
        )
        want_y[place], want_x[place] = one[0], g * one[1]
        for name, slope in zip(("left", "right", "values", "slope_left", "slope_right"), one[2:], strict=True):
            want[name][c] += g * slope
    # Sums of a few dozen float64 terms of size about 10, in another order: some 1e-14.
    np.testing.assert_allclose(y.detach(), want_y, rtol=0, atol=1e-13)
    np.testing.assert_allclose(x.grad, want_x, rtol=0, atol=1e-13)
    for name, parameter in unit.named_parameters():
        np.testing.assert_allclose(parameter.grad, want[name], rtol=0, atol=1e-12, err_msg=name)


def test_by_hand():
    # N = 2 on [-1, 1], heights 1, 0, 2: slopes -1 and 2; K_L = 0.5, K_R = 3.
    unit = PWLU(1, intervals=2, bound=1.0)
    with torch.no_grad():
        unit.values.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        unit.slope_left.fill_(0.5)
        unit.slope_right.fill_(3.0)
    x = torch.tensor([[-3.0], [-1.0], [-0.5], [0.0], [0.5], [1.0], [2.0]], requires_grad=True)
    y = unit(x)
    assert y.flatten().tolist() == [0.0, 1.0, 0.5, 0.0, 1.0, 2.0, 5.0]
    y.sum().backward()
    # -1 and 0 belong to the interval on their right, 1 (B_R) to the outer segment.
    assert x.grad.flatten().tolist() == [0.5, -1.0, -1.0, 2.0, 2.0, 3.0, 3.0]
    assert unit.slope_left.grad.item() == -2.0
    assert unit.slope_right.grad.item() == 1.0
    assert unit.values.grad.flatten().tolist() == [1 + 1 + 0.5, 0.5 + 1 + 0.5, 0.5 + 2]
    # dB_L: -K_L, then K_i (x - 1) / 2 at -1, -0.5, 0, 0.5; dB_R: -K_i (x + 1) / 2 at the same, then -K_R twice.
    assert unit.left.grad.item() == -0.5 + 1.0 + 0.75 - 1.0 - 0.5
    assert unit.right.grad.item() == 0.0 + 0.25 - 1.0 - 1.5 - 6.0


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_gradcheck_once_and_twice(channels, axis, shape):
    unit = trained(channels, axis, seed=1)
    # Uniform points are 1e-6, gradcheck's step, from a breakpoint with negligible chance; the seed is fixed.
    x = torch.empty(shape, dtype=torch.float64).uniform_(-5, 5).requires_grad_()
    place = 0 if channels is None else axis % len(shape)
    parameters = [p.detach().clone().requires_grad_() for p in unit.parameters_in_order()]

    def function(*tensors):
        return PWLUFunction.apply(*tensors, place)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_blocks_and_plain_operators_agree_bit_for_bit(channels, axis, shape, monkeypatch):
    monkeypatch.setattr("relu_deploy.nn.pwlu_function.BLOCK", 7)  # several blocks, and a last one that is shorter
    unit = trained(channels, axis).float()
    x = 3 * torch.randn(shape)
    raw = unit.parameters_in_order()
    plain = evaluate(x, tables_of(raw.as_work(torch.float32)), 0 if channels is None else axis % x.ndim)
    assert torch.equal(unit(x), plain)


def test_plain_operators_have_the_same_gradients():
    unit = trained(3)
    raw = unit.parameters_in_order()
    x = torch.randn(8, 3, 4, dtype=torch.float64).mul_(3).requires_grad_()
    inputs = [x, *raw]
    plain = torch.autograd.grad(evaluate(x, tables_of(raw.as_work(torch.float64)), 1).square().sum(), inputs)
    blocks = torch.autograd.grad(unit(x).square().sum(), inputs)
    for name, a, b in zip(("x", *raw._fields), plain, blocks, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11, err_msg=name)  # order of float64 sums
