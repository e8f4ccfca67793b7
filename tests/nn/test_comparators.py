from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.comparators import APL, AxisPReLU, Maxout, maxout  # noqa: E402
from relu_deploy.nn.contextual import PAU, FReLU, SEReLU, fit_pau  # noqa: E402

pytestmark = pytest.mark.torch

CHANNELWISE = [
    pytest.param(1, (3, 4), id="NC"),
    pytest.param(1, (2, 4, 3, 2), id="NCHW"),
    pytest.param(-1, (2, 5, 4), id="NTC"),
]


def randomised(unit: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return unit.double()


@pytest.mark.parametrize(("axis", "shape"), CHANNELWISE)
def test_axis_prelu_is_torchs_with_the_channels_elsewhere(axis, shape):
    unit = randomised(AxisPReLU(4, channel_axis=axis))
    known = nn.PReLU(4).double()
    known.load_state_dict(unit.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(unit(x), known(x.movedim(axis, 1)).movedim(1, axis))


@pytest.mark.parametrize(("axis", "shape"), CHANNELWISE)
def test_maxout_is_the_maximum_of_linear_maps(axis, shape):
    unit = randomised(Maxout(4, pieces=3, channel_axis=axis))
    x = torch.randn(shape, dtype=torch.float64)
    maps = unit.weight.view(3, 4, 4), unit.bias.view(3, 4)
    each = [F.linear(x.movedim(axis, -1), w, b) for w, b in zip(*maps, strict=True)]
    want = torch.stack(each).amax(0).movedim(-1, axis)
    torch.testing.assert_close(unit(x), want, rtol=0, atol=1e-13)


def test_maxout_after_a_convolution_is_the_maximum_of_convolutions():
    torch.manual_seed(0)
    convolution, unit = nn.Conv2d(3, 4, 3).double(), randomised(Maxout(4))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    merged = torch.einsum("oc,cikl->oikl", unit.weight, convolution.weight)
    wide = F.conv2d(x, merged, unit.weight @ convolution.bias + unit.bias)
    torch.testing.assert_close(unit(convolution(x)), maxout(wide, 2), rtol=0, atol=1e-13)


def test_maxout_with_equal_pieces_is_one_linear_map():
    unit = randomised(Maxout(4, pieces=2))
    with torch.no_grad():
        unit.weight[4:] = unit.weight[:4]
        unit.bias[4:] = unit.bias[:4]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(unit(x), F.conv2d(x, unit.weight[:4, :, None, None], unit.bias[:4]))


def test_maxout_of_three_starts_near_relu_with_pieces_that_differ():
    unit = Maxout(8, pieces=3)
    x = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert (unit(x) - torch.relu(x)).abs().max() < 0.2
    assert not torch.equal(unit.weight[8:16], unit.weight[16:])


def test_apl_by_hand():
    unit = APL(1, hinges=2)
    assert unit.hinges.flatten().tolist() == [-1.0, 1.0]
    with torch.no_grad():
        unit.slopes.copy_(torch.tensor([[0.5], [-0.25]]))
    x = torch.tensor([[-3.0], [0.0], [0.5], [2.0]], requires_grad=True)
    # 0.5 max(0, -1 - x) - 0.25 max(0, 1 - x): 1 - 1, -0.25, 0.5 - 0.125, 2.
    y = unit(x)
    assert y.flatten().tolist() == [0.0, -0.25, 0.375, 2.0]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [-0.5 + 0.25, 0.25, 1.25, 1.0]
    assert unit.slopes.grad.flatten().tolist() == [2.0, 4.0 + 1.0 + 0.5]


@pytest.mark.parametrize(
    "unit", [APL(), APL(4, hinges=1), APL(4, hinges=5), Maxout(4), AxisPReLU(4, init=0.0)], ids=str
)
def test_starts_as_relu(unit):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unit(x), torch.relu(x))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25])
def test_pau_starts_near_leaky_relu(slope):
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    unit = PAU(slope=slope).double()
    assert (unit(x) - F.leaky_relu(x, slope)).abs().max().item() < 0.04
    low, high = unit(torch.tensor([-1e4, 1e4], dtype=torch.float64)).tolist()
    assert low / -1e4 == pytest.approx((1 + slope) / 2, abs=1e-2)
    assert high / 1e4 == pytest.approx((1 + slope) / 2, abs=1e-2)


def test_pau_by_hand():
    unit = PAU(1, degrees=(2, 2))
    with torch.no_grad():
        unit.numerator.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        unit.denominator.copy_(torch.tensor([[-2.0], [0.5]]))
    # (1 + 2 x + 3 x^2) / (1 + |-2 x + x^2 / 2|) at 2: 17 / 3; at -2: 9 / 7.
    assert unit(torch.tensor([[2.0], [-2.0]])).flatten().tolist() == pytest.approx([17 / 3, 9 / 7], abs=1e-6)


def test_pau_is_the_same_a_channel_as_a_layer():
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PAU(4, channel_axis=-1)(x), PAU()(x))


def test_pau_fit_beats_its_neighbours():
    numerator, denominator = (np.array(c) for c in fit_pau(5, 4, 0.0))
    x = np.linspace(-3, 3, 601)

    def error(a, b):
        return np.square(np.polyval(a[::-1], x) / (1 + np.abs(np.polyval([*b[::-1], 0], x))) - np.maximum(x, 0)).sum()

    assert denominator[0] == denominator[2] == 0
    best = error(numerator, denominator)
    # Stepping a tenth of any coefficient is worse: the weights are near the optimum's.
    for i in range(6):
        step = np.eye(6)[i] * 0.1 * numerator[i]
        assert best < min(error(numerator + step, denominator), error(numerator - step, denominator))


def test_frelu_is_the_larger_of_itself_and_its_neighbourhood():
    torch.manual_seed(0)
    unit = FReLU(2).double().eval()
    with torch.no_grad():
        unit.condition.weight.zero_()
        unit.condition.weight[0, 0, 1, 2] = 1.0  # the right neighbour
        unit.condition.weight[1, 0, 1, 1] = -1.0  # minus itself: the absolute value
    scale = 1 / np.sqrt(1 + unit.norm.eps)
    x = torch.tensor([[[[1.0, 3.0, -2.0]], [[1.0, -3.0, 2.0]]]], dtype=torch.float64)
    want = [[[3 * scale, 3.0, 0.0]], [[1.0, 3 * scale, 2.0]]]
    np.testing.assert_allclose(unit(x).detach().numpy()[0], want, rtol=0, atol=1e-12)


def test_frelu_normalises_in_training_and_keeps_statistics():
    torch.manual_seed(0)
    unit = FReLU(3, spatial=2, channel_axis=-1)
    unit(torch.randn(4, 6, 6, 3))
    assert int(unit.norm.num_batches_tracked) == 1
    assert float(unit.condition.weight.detach().std()) == pytest.approx(1 / 3, rel=0.5)


def test_se_relu_by_hand():
    unit = SEReLU(1)
    with torch.no_grad():
        unit.squeeze.weight.fill_(1.0)
        unit.squeeze.bias.zero_()
        unit.excite.weight.fill_(np.log(3) / 2)
        unit.excite.bias.zero_()
    # relu: 4, 0; mean 2; gate sigmoid(ln 3) = 3/4.
    torch.testing.assert_close(unit(torch.tensor([[[4.0, -4.0]]])), torch.tensor([[[3.0, 0.0]]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AxisPReLU(0), "channels of PReLU is 0"),
        (lambda: Maxout(4, pieces=0), "pieces of Maxout is 0"),
        (lambda: Maxout(4)(torch.zeros(2, 3)), "Maxout of 4 channels on axis 1"),
        (lambda: maxout(torch.zeros(2, 5), 2), "5 channels are not 2 equal blocks"),
        (lambda: APL(hinges=0), "hinges of APL is 0"),
        (lambda: APL(True), "channels of APL is True"),
        (lambda: PAU(degrees=(5, 0)), "a degree of PAU is 0"),
        (lambda: PAU(slope=float("inf")), "slope of PAU is inf"),
        (lambda: FReLU(4, kernel=2), "kernel 2"),
        (lambda: FReLU(4, spatial=4), "over 4 axes"),
        (lambda: FReLU(4)(torch.zeros(2, 4, 5)), "over 2 spatial axes got input of shape"),
        (lambda: SEReLU(4, reduction=0), "reduction is 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(TrainingError, match=message):
        make()
