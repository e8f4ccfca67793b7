from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.distill.trainer import (  # noqa: E402
    TrainConfig,
    accuracy,
    cross_entropy,
    fit,
    hard_label_objective,
)
from relu_deploy.errors import DataError, TrainingError  # noqa: E402

pytestmark = pytest.mark.torch

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] + X[:, 1] > 0).long()


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def run(model, **options):
    config = TrainConfig(**{"epochs": 8, "batch_size": 16, "learning_rate": 1e-2, **options})
    return fit(model, X, Y, objective=cross_entropy, config=config)


def test_learns():
    model = network()
    before = accuracy(model, X, Y)
    report = run(model)
    assert report.steps == 48
    assert report.losses[-1] < report.losses[0] / 2
    assert accuracy(model, X, Y) > max(before, 0.9)
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_leaves_the_caller_its_random_numbers():
    first, second, other = network(), network(), network()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(first)
    assert torch.equal(torch.rand(1), expected)
    run(second)
    run(other, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_progress_counts_every_step():
    seen = []
    fit(
        network(), X, Y, objective=cross_entropy, config=TrainConfig(epochs=2, batch_size=32), what="t",
        progress=lambda *told: seen.append(told),
    )  # fmt: skip
    assert seen == [("t", step, 6) for step in range(1, 7)]


def test_the_teacher_is_not_trained():
    teacher = network().train()
    before = [tensor.clone() for tensor in teacher.state_dict().values()]
    fit(network(), X, Y, objective=hard_label_objective(teacher), config=TrainConfig(epochs=1, batch_size=16))
    # BatchNorm's running statistics are in the state_dict: a teacher in training mode would have moved them.
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


def test_a_loss_that_is_not_finite_names_the_step():
    calls = []

    def objective(model, inputs, labels):
        calls.append(1)
        return cross_entropy(model, inputs, labels) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(TrainingError, match="student: the loss is nan at step 3 of 6"):
        fit(network(), X, Y, objective=objective, config=TrainConfig(epochs=1, batch_size=16), what="student")
    assert len(calls) == 3


def test_bad_data_and_options_are_refused():
    config = TrainConfig(epochs=1, batch_size=16)
    with pytest.raises(DataError, match="96 samples and 95 labels"):
        fit(network(), X, Y[:-1], objective=cross_entropy, config=config)
    with pytest.raises(DataError, match="fewer than one batch of 16"):
        fit(network(), X[:3], Y[:3], objective=cross_entropy, config=config)
    with pytest.raises(TrainingError, match="no parameters"):
        fit(nn.Identity(), X, Y, objective=cross_entropy, config=config)
    with pytest.raises(TrainingError, match="must be positive"):
        TrainConfig(epochs=0)
    with pytest.raises(DataError, match="one label a sample"):
        accuracy(network(), X[:0], Y[:0])
