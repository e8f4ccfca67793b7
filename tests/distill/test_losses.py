from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from relu_deploy.distill.losses import (  # noqa: E402
    channel_wise_distillation,
    hard_label_distillation,
    kl_on_logits,
)
from relu_deploy.errors import TrainingError  # noqa: E402

pytestmark = pytest.mark.torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hard_label_by_hand():
    # psi(student) = (1/4, 3/4); the label is class 0, the teacher decides for class 1.
    student = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    teacher = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    loss = hard_label_distillation(student, teacher, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3), abs=1e-12)


def test_hard_label_teaches_the_student_in_both_terms():
    """The printed equation's second term would have no gradient: with it, this gradient would be half as large."""
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    hard_label_distillation(student, teacher, torch.tensor([0])).backward()
    assert student.grad.tolist() == [[-0.5, 0.5]]  # psi - onehot, the full cross-entropy gradient
    assert teacher.grad is None


def test_hard_label_equals_cross_entropy_when_the_teacher_is_right():
    student, labels = normal(8, 5), torch.arange(8) % 5
    teacher = torch.nn.functional.one_hot(labels, 5).double()
    expected = torch.nn.functional.cross_entropy(student, labels)
    assert hard_label_distillation(student, teacher, labels).item() == pytest.approx(expected.item(), abs=1e-12)


def test_kl_by_hand():
    # teacher (1/2, 1/2), student (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3)
    student = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    assert kl_on_logits(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-12)


def test_channel_wise_by_hand():
    # One channel as above over two positions, a second channel that agrees: the mean over C = 2 halves it.
    student = torch.tensor([[[[0.0, math.log(3.0)]], [[1.0, 2.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[0.0, 0.0]], [[1.0, 2.0]]]], dtype=torch.float64)
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert channel_wise_distillation(student, teacher).item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)  # the first call loads kernels, and the cores are shared
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_equal_distributions_are_the_minimum(shift, seed):
    teacher = normal(2, 3, 4, 5, seed=seed)
    for loss in (channel_wise_distillation, kl_on_logits):
        # A softmax does not see a shift; what is left is rounding of float64 near 50.
        assert abs(loss(teacher + shift, teacher).item()) < 1e-12
        student = (teacher + shift).requires_grad_()
        loss(student, teacher).backward()
        assert student.grad.abs().max() < 1e-12
        assert loss(normal(2, 3, 4, 5, seed=seed + 1), teacher).item() > 0


def test_channel_wise_matches_the_formula_written_out():
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    p = torch.softmax(teacher.flatten(2), dim=2)
    q = torch.softmax(student.flatten(2), dim=2)
    expected = (p * torch.log(p / q)).sum() / (2 * 3)
    assert channel_wise_distillation(student, teacher).item() == pytest.approx(expected.item(), abs=1e-12)


def test_extreme_logits_stay_finite():
    far = torch.tensor([[1e4, 0.0]])
    assert kl_on_logits(-far, far).item() == pytest.approx(1e4)


def test_shapes_are_held_against_each_other():
    with pytest.raises(TrainingError, match="of one shape"):
        kl_on_logits(normal(2, 3), normal(3, 3))
    with pytest.raises(TrainingError, match=r"\(N, C, H, W\)"):
        channel_wise_distillation(normal(2, 3), normal(2, 3))
