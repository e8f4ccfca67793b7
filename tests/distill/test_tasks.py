"""Losses and metrics of the tasks, by hand, and a training of each."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch.utils.data import TensorDataset  # noqa: E402

from relu_deploy.distill.config import DistillConfig  # noqa: E402
from relu_deploy.distill.distiller import Distiller  # noqa: E402
from relu_deploy.distill.losses import channel_wise_distillation, kl_on_logits  # noqa: E402
from relu_deploy.distill.tasks import (  # noqa: E402
    ClassificationTask,
    DetectionTask,
    LanguageTask,
    QuestionAnsweringTask,
    call,
    features,
    logits,
    make_task,
    stack_images,
)
from relu_deploy.errors import DataError, TrainingError  # noqa: E402

pytestmark = pytest.mark.torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Gives the same output for every input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def measured(task, *batches):
    measures = task.measures()
    for output, target in batches:
        task.update(measures, output, target)
    return {name: value.item() for name, value in measures.compute().items()}


def test_classification_counts_what_is_right_and_top5_from_six_classes_on():
    scores = torch.eye(6)[[0, 1, 2, 3]]
    scores[3, 5] = -1
    # The third label is among the first five of its row, the fourth is the last of its.
    assert measured(ClassificationTask(6), (scores, torch.tensor([0, 1, 4, 5])))["accuracy"] == 0.5
    assert measured(ClassificationTask(6), (scores[3:], torch.tensor([5])))["accuracy_top5"] == 0
    assert "accuracy_top5" not in measured(ClassificationTask(5), (torch.eye(5), torch.arange(5)))


def test_language_distils_eq_5_and_leaves_out_padding():
    task = LanguageTask(3, ignore_index=-100)
    student, teacher = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    labels = torch.tensor([[0, 1, -100, -100], [2, 0, 1, -100]])
    terms = task.losses(Fixed(student), Fixed(teacher), torch.zeros(2), labels, weight=2.0)
    assert terms["distill"].item() == pytest.approx(2 * kl_on_logits(student, teacher).item())
    alone = task.losses(Fixed(student), None, torch.zeros(2), labels, weight=2.0)["task"]
    kept = labels != -100
    assert alone.item() == pytest.approx(F.cross_entropy(student[kept], labels[kept]).item())
    found = measured(task, (student, labels))
    assert found["accuracy"] == pytest.approx((student[kept].argmax(1) == labels[kept]).float().mean().item())


def test_macro_f1_by_hand():
    scores = F.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()
    # Class 0: precision 1/2, recall 1; class 1: precision 1, recall 2/3.
    expected = (2 / 3 + 4 / 5) / 2
    assert measured(LanguageTask(2), (scores, torch.tensor([0, 1, 1, 1])))["f1"] == pytest.approx(expected)


def spans(start, end):
    return types.SimpleNamespace(start_logits=start, end_logits=end)


def test_question_answering_halves_two_losses_and_measures_as_squad_does():
    task = QuestionAnsweringTask(lambda output, target: (output, target))
    mine, its = spans(normal(2, 5), normal(2, 5, seed=1)), spans(normal(2, 5, seed=2), normal(2, 5, seed=3))
    target = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 4])}
    x = torch.zeros(2)
    both = task.losses(Fixed(mine), Fixed(its), x, target, weight=1.0)["distill"]
    halves = kl_on_logits(mine.start_logits, its.start_logits) + kl_on_logits(mine.end_logits, its.end_logits)
    assert both.item() == pytest.approx(halves.item() / 2)
    alone = task.losses(Fixed(mine), None, x, target, weight=1.0)["task"]
    entropies = F.cross_entropy(mine.start_logits, target["start_positions"])
    entropies = entropies + F.cross_entropy(mine.end_logits, target["end_positions"])
    assert alone.item() == pytest.approx(entropies.item() / 2)
    said = [{"id": "a", "prediction_text": "The black cat!"}, {"id": "b", "prediction_text": "in a far country"}]
    meant = [
        {"id": "a", "answers": {"text": ["black cat", "dog"], "answer_start": [0, 0]}},
        {"id": "b", "answers": {"text": ["far away country"], "answer_start": [0]}},
    ]
    # Case, points and articles do not count. b: "in far country" against three words, two in common.
    found = measured(task, (said, meant))
    assert found["exact_match"] == pytest.approx(50)
    assert found["f1"] == pytest.approx((100 + 100 * 2 / 3) / 2, abs=1e-3)  # float32 percent


class Detector(nn.Module):
    """Objectness of each cell of a grid of 4 by 4 on images of 16 by 16."""

    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.neck = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), act())
        self.head = nn.Conv2d(4, 1, 3, stride=2, padding=1)
        self.unused = nn.Identity()

    def forward(self, x):
        return self.head(self.neck(x)).flatten(1)


def boxes_of(output):
    """The best cell of each image as a box of its own size."""
    found = []
    for row in output:
        y, x = divmod(int(row.argmax()), 4)
        found.append({
            "boxes": torch.tensor([[4.0 * x, 4.0 * y, 4.0 * x + 4, 4.0 * y + 4]]), "scores": row.max().sigmoid()[None],
            "labels": torch.zeros(1, dtype=torch.long),
        })  # fmt: skip
    return found


def cells(targets):
    return torch.tensor([int(t["boxes"][0, 1] // 4 * 4 + t["boxes"][0, 0] // 4) for t in targets])


def detection_task(layers=("neck",)):
    return DetectionTask(layers, loss=lambda out, targets: F.cross_entropy(out, cells(targets)), predict=boxes_of)


class Squares(torch.utils.data.Dataset):
    """A bright square of four pixels in a cell."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        y, x = divmod(i % 16, 4)
        image = torch.zeros(1, 16, 16)
        image[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1 + i / 48
        box = torch.tensor([[4.0 * x, 4.0 * y, 4.0 * x + 4, 4.0 * y + 4]])
        return image, {"boxes": box, "labels": torch.zeros(1, dtype=torch.long)}


def test_detection_adds_eq_4_over_the_layers_to_its_own_loss():
    torch.manual_seed(0)
    student, teacher, task = Detector(), Detector(), detection_task(("neck", "head"))
    images, targets = stack_images([Squares()[i] for i in (3, 9)])
    terms = task.losses(student, teacher, images, targets, weight=3.0)
    own = F.cross_entropy(student(images), cells(targets))
    maps = [(net.neck(images), net.head(net.neck(images))) for net in (student, teacher)]
    expected = 3 * sum(channel_wise_distillation(a, b).item() for a, b in zip(*maps, strict=True)) / 2
    assert terms["task"].item() == pytest.approx(own.item())
    assert terms["distill"].item() == pytest.approx(expected)
    terms["distill"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert task.losses(student, None, images, targets, weight=3.0).keys() == {"task"}
    assert not student.neck._forward_hooks


def test_layers_that_are_not_there_or_do_not_run_are_named():
    images, targets = stack_images([Squares()[0]])
    for name, says in (("nek", "no module 'nek'"), ("unused", "'unused' did not run")):
        with pytest.raises(TrainingError, match=says):
            detection_task((name,)).losses(Detector(), Detector(), images, targets, weight=1.0)
    with pytest.raises(TrainingError, match="names of layers"):
        detection_task(())
    wrapped = nn.Module()
    wrapped.module = Detector()  # as DistributedDataParallel holds it
    with features(wrapped, ["neck"]) as found:
        wrapped.module(images)
    assert found["neck"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("recipe", ["B+KD-SAT", "B"])
def test_a_detector_is_distilled_to_the_end(tmp_path, recipe):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'relu-deploy[torch]'")
    torch.manual_seed(0)
    config = DistillConfig(recipe=recipe, task="detection", epochs=6, batch_size=8, learning_rate=0.05, log_steps=1)
    distiller = Distiller(
        Detector(), train=Squares(), evaluate=Squares(), config=config, out=tmp_path, task=detection_task()
    )
    report = distiller.run()
    assert report.metrics["map"] > report.teacher_metrics["map"] + 0.2
    assert set(report.epochs[0]["losses"]) == ({"task"} if recipe == "B" else {"task", "distill"})


class Reader(nn.Module):
    """Start and end logits of each token."""

    def __init__(self):
        super().__init__()
        self.embed, self.act, self.out = nn.Embedding(8, 8), nn.GELU(), nn.Linear(8, 2)
        self.inner = nn.Linear(8, 8)

    def forward(self, ids, mask=None):
        start, end = self.out(self.act(self.inner(self.embed(ids)))).unbind(-1)
        return types.SimpleNamespace(start_logits=start, end_logits=end)


def test_a_reader_is_distilled_with_its_own_task(tmp_path):
    """Dict inputs, dict targets: the answer is where the token 7 stands."""

    def sample(i):
        ids = torch.full((6,), i % 6)
        ids[i % 5] = 7
        return {"ids": ids}, {"start_positions": torch.tensor(i % 5), "end_positions": torch.tensor(i % 5)}

    def answers(output, target):
        found = output.start_logits.argmax(1).tolist()
        said = [{"id": str(i), "prediction_text": f"w{j}"} for i, j in enumerate(found)]
        right = target["start_positions"].tolist()
        return said, [{"id": str(i), "answers": {"text": [f"w{j}"], "answer_start": [0]}} for i, j in enumerate(right)]

    data = [sample(i) for i in range(64)]
    config = DistillConfig(recipe="B", task="language", epochs=8, batch_size=8, learning_rate=0.05)
    torch.manual_seed(0)
    task = QuestionAnsweringTask(answers)
    first = Distiller(Reader(), train=data, evaluate=data, config=config, out=tmp_path / "b", task=task)
    assert first.run().metrics["exact_match"] > 90
    config = DistillConfig(recipe="B+KD", task="language", epochs=2, batch_size=8)
    report = Distiller(
        first.student, train=data, evaluate=data, config=config, out=tmp_path / "kd", task=task
    ).run()  # fmt: skip
    assert report.swap.replaced[0].old == "GELU"
    assert report.metrics["f1"] > 90


def test_outputs_without_logits_and_images_of_two_sizes_are_told():
    assert logits({"logits": torch.ones(1)}).item() == 1
    assert logits((torch.ones(1), 2)).item() == 1
    with pytest.raises(TrainingError, match="a str, in which there are no logits"):
        logits("text")
    with pytest.raises(DataError, match="several sizes"):
        stack_images([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 0)])
    assert call(lambda a, b: a - b, {"b": 1, "a": 3}) == call(lambda a, b: a - b, (3, 1)) == 2


def test_named_tasks():
    assert make_task("language", 3).ignore_index == -100
    for arguments, says in ((("detection", 3), "detection needs"), (("classification", None), "not known")):
        with pytest.raises(TrainingError, match=says):
            make_task(*arguments)
    with pytest.raises(TrainingError, match="two classes or more"):
        make_task("classification", 1)


def test_a_metric_that_is_not_a_number_is_left_out_and_told(tmp_path):
    class Odd(ClassificationTask):
        def measures(self):
            from torchmetrics import MeanMetric, MetricCollection

            return MetricCollection({"accuracy": super().measures()["accuracy"], "odd": MeanMetric()})

        def update(self, measures, output, target):
            measures["accuracy"].update(output, target)

    data = TensorDataset(normal(16, 4), torch.arange(16) % 2)
    net = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2))
    config = DistillConfig(epochs=1, batch_size=8)
    with pytest.warns(UserWarning, match="called before"):
        report = Distiller(net, train=data, evaluate=data, config=config, out=tmp_path, task=Odd(2)).run()
    assert report.metrics.keys() == {"accuracy"}
    assert report.notes == ("odd was nan in an evaluation and is left out there",)
