from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.blend import Blend  # noqa: E402
from relu_deploy.nn.swap import SMOOTH, relu, replace_activations  # noqa: E402

pytestmark = pytest.mark.torch


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sigmoid(), nn.ReLU())


def test_replaces_smooth_modules_and_lists_the_rest():
    student, report = replace_activations(small(), relu)
    assert [(r.name, r.old, r.new) for r in report.replaced] == [("1", "SiLU", "ReLU"), ("2.1", "GELU", "ReLU")]
    assert [(skip.name, skip.reason.split(",")[0]) for skip in report.left] == [
        ("3", "a gate or a head"),
        ("4", "already ReLU"),
    ]
    assert isinstance(student[1], nn.ReLU)
    assert isinstance(student[3], nn.Sigmoid)


def test_the_model_is_left_and_the_copy_has_its_weights():
    model = small().eval()
    student, _ = replace_activations(model, relu)
    assert isinstance(model[1], nn.SiLU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), student.parameters(), strict=True))
    with torch.no_grad():
        student[0].weight.add_(1)
    assert not torch.equal(model[0].weight, student[0].weight)
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize("kind", SMOOTH)
def test_every_smooth_kind(kind):
    student, report = replace_activations(nn.Sequential(kind()), relu)
    assert isinstance(student[0], nn.ReLU)
    assert [r.old for r in report.replaced] == [kind.__name__]


def test_blend_keeps_the_old_activation_inside():
    student, _ = replace_activations(small(), Blend)
    assert isinstance(student[1], Blend)
    assert isinstance(student[1].act, nn.SiLU)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    plain, _ = replace_activations(student, relu, kinds=[Blend])
    assert not torch.equal(plain(x), student(x))


def test_a_shared_activation_stays_shared():
    act = nn.SiLU()
    student, report = replace_activations(nn.ModuleDict({"a": act, "b": nn.Sequential(act)}), relu)
    assert student["a"] is student["b"][0]
    assert [r.name for r in report.replaced] == ["a", "b.0"]


def test_an_activation_alone_is_replaced():
    student, report = replace_activations(nn.SiLU(), relu)
    assert isinstance(student, nn.ReLU)
    assert [r.name for r in report.replaced] == [""]


def test_keep_leaves_by_name():
    _, report = replace_activations(small(), relu, keep=["2.*"])
    assert [r.name for r in report.replaced] == ["1"]
    assert ("2.1", "named in keep") in [(skip.name, skip.reason) for skip in report.left]
    with pytest.raises(TrainingError, match=r"'head\.\*' of keep matches no module"):
        replace_activations(small(), relu, keep=["head.*"])


def test_a_subclass_with_its_own_forward_is_another_function():
    class Swish2(nn.SiLU):
        def forward(self, x):
            return x * torch.sigmoid(2 * x)

    _, report = replace_activations(nn.Sequential(Swish2()), relu)
    assert report.replaced == ()
    assert "forward of its own" in report.left[0].reason


def test_a_torch_class_is_refused_as_it_would_take_the_module_for_an_option():
    with pytest.raises(TrainingError, match="would take the old activation for an option"):
        replace_activations(small(), nn.ReLU)
