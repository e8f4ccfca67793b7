"""The three distillation losses of "ReLU for inference acceleration": classification, detection, language.

Each takes student and teacher, detaches the teacher, and returns a scalar in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError


def hard_label_distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Half cross entropy against the labels, half against the teacher's decision.

    ``L = 1/2 CE(psi(Z_s), y) + 1/2 CE(psi(Z_s), y_t)`` with ``y_t = argmax_c Z_t``.

    Equation 3 of the paper prints ``psi(Z_t)`` in the second term. That term would not depend on the student, so it
    would teach it nothing; Touvron et al. 2021 (arXiv:2012.12877, eq. 3), from whom the paper takes the loss, have the
    student there, and so do we.

    Args:
        student: Logits, float, shape ``(N, classes)``.
        teacher: Logits, float, shape ``(N, classes)``.
        labels: True classes, int64, shape ``(N,)``.

    Returns:
        Scalar, mean over the batch.

    Raises:
        TrainingError: the shapes of student and teacher differ.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 0.0]])
    >>> round(hard_label_distillation(logits, torch.tensor([[5.0, 1.0]]), torch.tensor([1])).item(), 4)  # ln 2
    0.6931
    """
    _check_shapes(student, teacher)
    decision = teacher.detach().argmax(dim=-1)
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * F.cross_entropy(student, decision)


def channel_wise_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of feature maps, each channel taken as a distribution over its positions.

    ``L = 1/C sum_c sum_i psi(f_t)_ci log(psi(f_t)_ci / psi(f_s)_ci)``, psi the softmax over the W*H positions i.

    Args:
        student: Features, float, shape ``(N, C, H, W)`` (or ``(N, C, ...)`` with one or more spatial axes).
        teacher: Features of the same shape.

    Returns:
        Scalar: summed over positions, mean over channels and over the batch. 0 when the two are equal (or differ by a
        constant in a channel, which a softmax does not see), positive otherwise.

    Raises:
        TrainingError: the shapes differ, or there is no spatial axis.

    Source: the paper's eq. 4, from Shu et al. 2021 (arXiv:2011.13256) at temperature 1.
    """
    _check_shapes(student, teacher)
    if student.dim() < 3:
        raise TrainingError(
            f"channel-wise distillation needs features of shape (N, C, H, W), not {tuple(student.shape)}",
            hint="for logits use kl_on_logits",
        )
    return _kl(student.flatten(2), teacher.flatten(2)).mean()


def kl_on_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence from the teacher's to the student's class distribution.

    ``L = sum_c psi(Z_t)_c log(psi(Z_t)_c / psi(Z_s)_c)``, psi the softmax over the last axis.

    Args:
        student: Logits, float, shape ``(..., classes)``; the leading axes are samples (batch, or batch and tokens).
        teacher: Logits of the same shape.

    Returns:
        Scalar: summed over classes, mean over samples. 0 when the distributions are equal, positive otherwise.

    Raises:
        TrainingError: the shapes differ.

    Source: the paper's eq. 5.
    """
    _check_shapes(student, teacher)
    return _kl(student, teacher).mean()


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the last axis, from log-probabilities on both sides: no logarithm of an underflowed zero is taken."""
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher.detach(), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"student and teacher need outputs of one shape, not {tuple(student.shape)} and {tuple(teacher.shape)}",
            hint="is the teacher the network that the student was made from?",
        )
