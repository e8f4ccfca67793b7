from __future__ import annotations

import copy
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

from relu_deploy.errors import BackendUnavailableError, TrainingError  # noqa: E402
from relu_deploy.nn import pwlu_kernel  # noqa: E402
from relu_deploy.nn.pwlu import PWLU, StaticPWLU  # noqa: E402
from relu_deploy.nn.pwlu_function import Parameters, evaluate, parameter_gradients, tables_of  # noqa: E402
from relu_deploy.nn.pwlu_kernel import CompiledPWLU, backward_compiled, forward_compiled  # noqa: E402
from relu_deploy.nn.pwlu_model import use_kernel  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in pwlu_kernel.COMPILERS), reason="no C++ compiler (apt install g++)"
)
pytestmark = [pytest.mark.torch, needs_compiler]

LAYOUTS = [
    pytest.param(3, 1, (4, 3), id="NC"),
    pytest.param(3, 1, (2, 3, 13), id="NCL"),
    pytest.param(3, 1, (2, 3, 5, 7), id="NCHW"),
    pytest.param(1, 1, (5, 1, 9), id="one channel"),
    pytest.param(600, -1, (3, 2, 600), id="NTC"),
    pytest.param(None, 1, (2, 4, 37), id="layer"),
    pytest.param(3, 1, (0, 3, 4, 4), id="no samples"),
    pytest.param(3, 1, (2, 3, 0), id="no positions"),
]


def trained(channels: int | None, axis: int = 1, *, intervals: int = 16, seed: int = 0) -> PWLU:
    torch.manual_seed(seed)
    unit = PWLU(channels, intervals=intervals, channel_axis=axis)
    with torch.no_grad():
        for tensor in unit.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return unit


def pair_of(unit: PWLU) -> tuple[PWLU, PWLU]:
    """The unit, and a copy on the compiled kernel."""
    fast = copy.deepcopy(unit)
    assert use_kernel(fast, "compiled") == 1
    return unit, fast


def run(unit: PWLU, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, gradient of the input and of the parameters."""
    x = x.detach().requires_grad_()
    y = unit(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *unit.parameters()], upstream))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """NaN at the same places, and elsewhere the very same numbers, signs of zero included."""
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    np.testing.assert_array_equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    assert torch.equal(a.nan_to_num(0.0).signbit(), b.nan_to_num(0.0).signbit())


@pytest.mark.parametrize(("channels", "axis", "shape"), LAYOUTS)
def test_outputs_and_input_gradients_are_bit_identical_and_parameter_gradients_close(channels, axis, shape):
    plain, fast = pair_of(trained(channels, axis))
    x, upstream = 3 * torch.randn(shape), torch.randn(shape)
    want, got = run(plain, x, upstream), run(fast, x, upstream)
    same_bits(want[0], got[0])
    same_bits(want[1], got[1])
    exact = run(copy.deepcopy(plain).double(), x.double(), upstream.double())
    names = [name for name, _ in plain.named_parameters()]
    for name, a, b in zip(names, exact[2:], got[2:], strict=True):
        # A few hundred float32 terms of size about 10.
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_layouts_in_memory(layout):
    plain, fast = pair_of(trained(16))
    x = 3 * torch.randn(4, 16, 6, 10)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    else:
        x = x[:, :, :1].expand(4, 16, 6, 10)
    upstream = torch.randn_like(x)
    want, got = run(plain, x, upstream), run(fast, x, upstream)
    same_bits(want[0], got[0])
    same_bits(want[1], got[1])
    np.testing.assert_allclose(got[3], want[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("intervals", [1, 2, 6, 7, 14, 16, 22, 23, 30, 31, 64])
def test_every_table_size_at_breakpoints_beside_them_and_on_special_values(intervals):
    unit = trained(2, -1, intervals=intervals)
    tables = tables_of(unit.parameters_in_order().as_work(torch.float32))
    fraction = torch.arange(-2, intervals + 3) / intervals
    points = (tables.left + tables.width * fraction.unsqueeze(1)).detach()
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38, -3.4e38])
    beside = [torch.nextafter(points, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    x = torch.cat((points, *beside, special.unsqueeze(1).expand(-1, 2)))
    want, got = evaluate(x, tables, 1), forward_compiled(x, tables, 1)
    same_bits(want.detach(), got)
    rows = x.t().contiguous().unsqueeze(0)  # the same, where a run of elements lies in one channel
    same_bits(evaluate(rows, tables, 1).detach(), forward_compiled(rows, tables, 1))
    for shape, axis in ((x, 1), (rows, 1)):
        ones = torch.ones_like(shape)
        wide = shape.clone().requires_grad_()
        (slope,) = torch.autograd.grad(evaluate(wide, tables, axis).sum(), wide)
        same_bits(slope, backward_compiled(shape, ones, tables, axis, parameters=False)[0])


def test_nan_reaches_output_and_parameter_gradients():
    plain, fast = pair_of(trained(2))
    x = torch.randn(3, 2, 20)
    x[1, 1, 4] = float("nan")
    want, got = run(plain, x, torch.ones_like(x)), run(fast, x, torch.ones_like(x))
    assert got[0].isnan().nonzero().tolist() == [[1, 1, 4]]
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    plain, fast = pair_of(trained(8))
    x, upstream = (3 * torch.randn(4, 8, 30)).to(dtype), torch.randn(4, 8, 30).to(dtype)
    want, got = run(plain, x, upstream), run(fast, x, upstream)
    same_bits(want[0], got[0])
    same_bits(want[1], got[1])
    for a, b in zip(want[2:], got[2:], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["rows", "columns", "layer"])
def test_sums_depend_on_neither_threads_nor_repetition(layout):
    unit = trained(None if layout == "layer" else 12)
    use_kernel(unit, "compiled")
    x = torch.randn(16, 12, 40, 40)
    x = x.to(memory_format=torch.channels_last) if layout == "columns" else x
    upstream = torch.randn_like(x)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(run(unit, x, upstream))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_long_sums_keep_their_digits():
    # 2^22 float32 ones: one float32 total would stop at 2^24, and lose digits of the slopes' sums long before.
    unit = trained(None)
    use_kernel(unit, "compiled")
    x = torch.rand(1 << 22) + 20
    got = run(unit, x, torch.ones_like(x))
    exact = run(copy.deepcopy(unit).double(), x.double(), torch.ones_like(x).double())
    for a, b in zip(exact[2:], got[2:], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


def test_second_derivatives_and_gradients_that_are_not_wanted():
    unit = trained(3)
    use_kernel(unit, "compiled")
    x = torch.randn(2, 3, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    (want,) = torch.autograd.grad(unit(x).sum(), x)
    np.testing.assert_allclose(second, 2 * want**2, rtol=1e-5)
    for parameter in unit.parameters():
        parameter.requires_grad_(False)
    unit(x).sum().backward()
    assert torch.equal(x.grad, want)
    assert CompiledPWLU.apply(x.detach(), *unit.parameters_in_order(), 1).requires_grad is False


def test_the_choice_is_kept_by_copies_and_static_forms_and_is_no_state():
    plain, fast = pair_of(trained(3))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(fast).kernel == "compiled"
    assert "kernel=compiled" in repr(fast)
    assert "kernel" not in repr(plain)
    static = fast.to_static()
    assert static.kernel == "compiled"
    x = 3 * torch.randn(4, 3, 50)
    same_bits(static(x), plain(x).detach())
    model = torch.nn.Sequential(fast, static)
    assert use_kernel(model, "blocks") == 2
    assert {module.kernel for module in model} == {"blocks"}
    assert isinstance(model[1], StaticPWLU)


def test_an_unknown_kernel_changes_nothing():
    unit = PWLU(2)
    with pytest.raises(TrainingError, match="no PWLU kernel 'numba'"):
        use_kernel(unit, "numba")
    assert unit.kernel == "blocks"


def test_no_compiler_and_a_compiler_that_fails(monkeypatch):
    unit = PWLU(2)
    monkeypatch.setattr("relu_deploy.nn.pwlu_model.library", pwlu_kernel.library.__wrapped__)  # not what was built
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda name: None)
        with pytest.raises(BackendUnavailableError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)") as caught:
            use_kernel(unit, "compiled")
        assert "needs none" in caught.value.hint
    failed = subprocess.CompletedProcess([], 1, "", "In file\nx.cpp:1: fatal error: omp.h: No such file\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(BackendUnavailableError, match=r"fatal error: omp\.h"):
        use_kernel(unit, "compiled")
    assert unit.kernel == "blocks"
    assert unit(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]


@given(seed=st.integers(0, 2**31), channels=st.integers(1, 9), intervals=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_tables_and_parameter_gradients_in_cpp_are_those_of_torch(seed, channels, intervals):
    generator = torch.Generator().manual_seed(seed)
    left = 3 * torch.randn(channels, generator=generator)
    right = left + 5 * torch.rand(channels, generator=generator) - 0.5  # some cross
    values = torch.randn(channels, intervals + 1, generator=generator)
    p = Parameters(left, right, values, *torch.randn(2, channels, generator=generator))
    work, packed = p.as_work(torch.float32), pwlu_kernel._tables(p)
    want = tables_of(work)
    assert torch.equal(packed.width, want.width)
    assert torch.equal(packed.slopes[:, : intervals + 2], want.slopes)
    assert torch.equal(packed.offsets[:, : intervals + 2], want.offsets)
    sums = torch.randn(*packed.slopes.shape, 2, dtype=torch.float64, generator=generator)
    used = sums[:, : intervals + 2]
    expected = parameter_gradients(Parameters(*(q.double() for q in work)), used[..., 0], used[..., 1])
    for mine, its in zip(pwlu_kernel._gradients(p, sums), expected, strict=True):
        # Sums of up to 30 float64 terms in another order, rounded once to float32.
        torch.testing.assert_close(mine, its.float(), rtol=1e-6, atol=1e-9 * float(its.abs().max()))


def test_boundaries_that_are_not_numbers_stay_so():
    nan = torch.tensor([float("nan")])
    one, values = torch.ones(1), torch.ones(1, 3)
    assert pwlu_kernel._tables(Parameters(nan, one, values, one, one)).width.isnan().all()
    assert pwlu_kernel._tables(Parameters(one, nan, values, one, one)).width.isnan().all()
