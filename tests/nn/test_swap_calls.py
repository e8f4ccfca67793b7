"""Activations that are calls and formulas in a model's source: every spelling a stranger's model may have."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402
from torch.nn.functional import gelu  # noqa: E402
from torch.nn.functional import silu as swish  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.blend import Blend  # noqa: E402
from relu_deploy.nn.swap import relu, replace_activations  # noqa: E402

pytestmark = pytest.mark.torch

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)


class Functional(Net):
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Tanh(Net):
    def forward(self, x):
        return self.b(F.gelu(self.a(x), approximate="tanh"))


class Imported(Net):
    def forward(self, x):
        return self.b(gelu(self.a(x)))


class Renamed(Net):
    def forward(self, x):
        return self.b(swish(self.a(x)))


class FullName(Net):
    def forward(self, x):
        return self.b(torch.nn.functional.silu(self.a(x)))


class SigmoidTimes(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(torch.sigmoid(h) * h)


class SigmoidMethod(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * h.sigmoid())


class QuickGelu(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * torch.sigmoid(1.702 * h))


class Erf(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0))))


class TanhFormula(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3)))))


class MishFormula(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * torch.tanh(F.softplus(h)))


class HardSwishFormula(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * F.relu6(h + 3) / 6)


class InPlace(Net):
    def forward(self, x):
        h = self.a(x)
        F.silu(h, inplace=True)
        return self.b(h)


class Super(Functional):
    def forward(self, x):
        return super().forward(x) + 1


class Attribute(Net):
    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Lambda(Attribute):
    def __init__(self):
        super().__init__()
        self.act = lambda x: x * torch.sigmoid(x)


class Partial(Attribute):
    def __init__(self):
        super().__init__()
        self.act = functools.partial(F.gelu, approximate="tanh")


class Table(Net):
    ACTIVATIONS = {"gelu": F.gelu}  # noqa: RUF012  # as strangers write it

    def forward(self, x):
        return self.b(self.ACTIVATIONS["gelu"](self.a(x)))


def helper(x):
    return x * torch.sigmoid(x)


class Helper(Net):
    def forward(self, x):
        return self.b(helper(self.a(x)))


class MadeInPlace(Net):
    def forward(self, x):
        return self.b(nn.GELU()(self.a(x)))


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class OtherMethod(Net):
    def forward(self, x):
        return self.b(self._hidden(x))

    def _hidden(self, x):
        return F.elu(self.a(x), alpha=0.5)


SPELLINGS = {
    Functional: "GELU", Tanh: "GELU(tanh)", Imported: "GELU", Renamed: "SiLU", FullName: "SiLU", SigmoidTimes: "SiLU",
    SigmoidMethod: "SiLU", QuickGelu: "QuickGELU", Erf: "GELU", TanhFormula: "GELU(tanh)", MishFormula: "Mish",
    HardSwishFormula: "Hardswish", InPlace: "SiLU", Super: "GELU", Attribute: "GELU", Lambda: "SiLU",
    Partial: "GELU(tanh)", Table: "GELU", Helper: "SiLU", MadeInPlace: "GELU", Decorated: "GELU",
    OtherMethod: "ELU(0.5)",
}  # fmt: skip


@pytest.mark.parametrize("example", [None, X], ids=["at_sight", "run"])
@pytest.mark.parametrize("cls", SPELLINGS, ids=lambda cls: cls.__name__)
def test_a_spelling_is_found_and_becomes_relu(cls, example):
    torch.manual_seed(0)
    teacher = cls()
    before = teacher(X)
    student, report = replace_activations(teacher, relu, example=example)
    assert [r.old for r in report.replaced] == [SPELLINGS[cls]]
    assert report.left == ()  # also: nothing smooth still runs
    expected = student.b(torch.relu(student.a(X))) + (cls is Super)
    assert torch.equal(student(X), expected)
    assert torch.equal(teacher(X), before)
    assert isinstance(student, cls)
    assert student.state_dict().keys() == teacher.state_dict().keys()


@pytest.mark.parametrize("cls", SPELLINGS, ids=lambda cls: cls.__name__)
def test_the_old_function_in_its_new_place_computes_the_same(cls):
    torch.manual_seed(0)
    teacher = cls()
    student, _ = replace_activations(teacher, Blend)  # gamma is 1: the old function alone
    # Formula and torch's own function differ by rounding: a few ulp of values near 1.
    torch.testing.assert_close(student(X), teacher(X), rtol=2e-6, atol=2e-6)


def test_what_is_made_in_two_statements_is_said_to_run_still():
    class Steps(Net):
        def forward(self, x):
            h = self.a(x)
            gate = torch.sigmoid(h)
            return self.b(h * gate)

    _, report = replace_activations(Steps(), relu, example=X)
    assert report.replaced == ()
    assert [skip.reason.split(" at ")[0] for skip in report.left] == ["still runs: sigmoid"]


def test_gates_and_heads_of_functional_models_are_left():
    class Gated(Net):
        def forward(self, x):
            h = F.gelu(self.a(x))
            h = F.silu(self.a(h)) * self.a(h + 1)
            return torch.sigmoid(self.b(h))

    _, report = replace_activations(Gated(), relu, example=X)
    assert [r.old for r in report.replaced] == ["GELU"]
    assert any(skip.reason.startswith("a gate") for skip in report.left)
    assert any("sigmoid" in skip.reason for skip in report.left)


def test_a_squeeze_excite_without_a_name_is_seen_by_its_data_flow():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.f1, self.f2 = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

        def forward(self, x):
            h = F.silu(self.c(x))
            s = torch.sigmoid(self.f2(F.silu(self.f1(h.mean((2, 3), keepdim=True)))))
            return self.d(h * s)

    _, report = replace_activations(Block(), relu, example=torch.randn(2, 3, 5, 5))
    assert len(report.replaced) == 1
    assert any(skip.reason.startswith("squeeze-excite") for skip in report.left)


def test_a_method_without_its_source_is_refused_and_said_to_run_still():
    scope = {"F": F}
    exec("def forward(self, x):\n    return self.b(F.gelu(self.a(x)))\n", scope)  # noqa: S102
    cls = type("Made", (Net,), {"forward": scope["forward"]})
    _, report = replace_activations(cls(), relu, example=X)
    assert [skip.reason.split(" at ")[0] for skip in report.left] == [
        "its source is not available", "still runs: gelu"
    ]  # fmt: skip


def test_a_forward_put_on_the_instance_is_refused():
    model = Net()
    model.forward = lambda x: model.b(F.gelu(model.a(x)))
    _, report = replace_activations(model, relu, example=X)
    assert report.replaced == ()
    assert any("on the instance" in skip.reason for skip in report.left)


def test_torchscript_is_refused():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        compiled = torch.jit.trace(Functional(), X)
    with pytest.raises(TrainingError, match="compiled by TorchScript"):
        replace_activations(compiled, relu)


@pytest.mark.parametrize("cls", [Functional, Super, Table, Attribute], ids=lambda cls: cls.__name__)
def test_a_rewritten_model_is_copied_pickled_compiled_and_exported(cls):
    torch.manual_seed(0)
    student, _ = replace_activations(cls(), relu)
    expected = student(X)
    assert torch.equal(copy.deepcopy(student)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(student))(X), expected)  # noqa: S301  # made here
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    file.seek(0)
    student.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.compile(student, backend="aot_eager", fullgraph=True)(X), expected)
    program = torch.export.export(student.eval(), (X,))
    assert torch.equal(program.module()(X), expected)
    assert not any("gelu" in str(node.target) for node in program.graph.nodes)


def test_two_calls_in_one_method_are_two_places_in_order():
    class Twice(Net):
        def forward(self, x):
            h = F.gelu(self.a(x))
            return self.b(F.silu(self.a(h)))

    student, report = replace_activations(Twice(), relu, example=X)
    assert [(r.name, r.old) for r in report.replaced] == [("forward_act0", "GELU"), ("forward_act1", "SiLU")]
    second, report = replace_activations(Twice(), relu, only=["forward_act1"], example=X)
    assert [r.name for r in report.replaced] == ["forward_act1"]
    assert not torch.equal(student(X), second(X))
