"""What is minimised and what is measured: classification, detection, language; a user's own task has the same form.

Metrics are torchmetrics', whose states are summed over all processes when they are computed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from calib.errors import MissingExtraError
from relu_deploy.distill.losses import channel_wise_distillation, hard_label_distillation, kl_on_logits
from relu_deploy.errors import DataError, TrainingError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    Measures = Metric | MetricCollection


class Task(Protocol):
    """What the distiller asks of a task.

    Attributes:
        metric: Name of the metric that the report's headline and the plot show.
        collate: Puts samples of the data set together to a batch ``(inputs, target)``; None is torch's default.
    """

    metric: str
    collate: Callable[[list[Any]], Any] | None

    def losses(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Any, target: Any, *, weight: float
    ) -> dict[str, Tensor]:
        """Run both networks and return the terms of the loss, whose sum is minimised.

        Args:
            student: In training mode.
            teacher: In evaluation mode; None where only labels count.
            inputs: Of a batch, as :func:`call` takes them.
            target: Of the batch.
            weight: Factor of the distillation where it is added to the task's own loss.
        """
        ...

    def measures(self) -> Measures:
        """A new metric or collection of metrics."""
        ...

    def update(self, measures: Any, output: Any, target: Any) -> None:
        """Add a batch's outputs to the metrics."""
        ...


class ClassificationTask:
    """Logits ``(N, classes)`` against labels ``(N,)``; eq. 3 distils, top-1 and top-5 accuracy measure.

    Args:
        classes: How many.
    """

    metric = "accuracy"
    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, classes: int) -> None:
        if classes < 2:
            raise TrainingError(f"a classifier has two classes or more, not {classes}")
        self.classes = classes

    def losses(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        inputs: Any,
        target: Any,
        *,
        weight: float,  # noqa: ARG002  # eq. 3 has its halves
    ) -> dict[str, Tensor]:
        """Cross entropy, or eq. 3 with a teacher."""
        mine = logits(call(student, inputs))
        if teacher is None:
            return {"task": F.cross_entropy(mine, target)}
        return {"distill": hard_label_distillation(mine, logits(_quietly(teacher, inputs)), target)}

    def measures(self) -> Measures:
        """Accuracy, and top-5 accuracy from six classes on."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        found: dict[str, Any] = {"accuracy": MulticlassAccuracy(self.classes, average="micro")}
        if self.classes > 5:  # the 5 of top-5
            found["accuracy_top5"] = MulticlassAccuracy(self.classes, average="micro", top_k=5)
        return MetricCollection(found)

    def update(self, measures: Any, output: Any, target: Any) -> None:
        """Add a batch."""
        measures.update(logits(output), target)


class LanguageTask(ClassificationTask):
    """As classification, distilled with the KL divergence of the logits (eq. 5), labels unused; for token logits too.

    Args:
        classes: Size of the last axis of the logits.
        ignore_index: A label of tokens that do not count in the metric.
    """

    def __init__(self, classes: int, *, ignore_index: int | None = None) -> None:
        super().__init__(classes)
        self.ignore_index = ignore_index

    def losses(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Any, target: Any, *, weight: float
    ) -> dict[str, Tensor]:
        """Cross entropy, or eq. 5 with a teacher."""
        mine = logits(call(student, inputs))
        if teacher is None:
            ignore = -100 if self.ignore_index is None else self.ignore_index
            return {"task": F.cross_entropy(mine.flatten(0, -2), target.flatten(), ignore_index=ignore)}
        return {"distill": weight * kl_on_logits(mine, logits(_quietly(teacher, inputs)))}

    def measures(self) -> Measures:
        """Accuracy and macro F1."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        return MetricCollection({
            "accuracy": MulticlassAccuracy(self.classes, average="micro", ignore_index=self.ignore_index),
            "f1": MulticlassF1Score(self.classes, average="macro", ignore_index=self.ignore_index),
        })  # fmt: skip

    def update(self, measures: Any, output: Any, target: Any) -> None:
        """Add a batch; tokens are samples."""
        measures.update(logits(output).flatten(0, -2), target.flatten())


class QuestionAnsweringTask:
    """Extractive question answering: eq. 5 on start and end logits, SQuAD's exact match and F1.

    Args:
        answers: Turns outputs and target into the two lists that ``torchmetrics.text.SQuAD`` compares: predictions
            ``{"id", "prediction_text"}`` and references ``{"id", "answers": {"text", "answer_start"}}``.
        collate: Puts samples together; target is a dict with ``start_positions`` and ``end_positions`` and whatever
            ``answers`` needs.
    """

    metric = "f1"

    def __init__(
        self,
        answers: Callable[[Any, Any], tuple[list[dict[str, Any]], list[dict[str, Any]]]],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.answers, self.collate = answers, collate

    def losses(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Any, target: Any, *, weight: float
    ) -> dict[str, Tensor]:
        """Mean of the two positions' losses."""
        mine = call(student, inputs)
        pairs = ((mine.start_logits, "start"), (mine.end_logits, "end"))
        if teacher is None:
            return {"task": sum((F.cross_entropy(x, target[f"{n}_positions"]) / 2 for x, n in pairs), torch.zeros(()))}
        other = _quietly(teacher, inputs)
        terms = [kl_on_logits(x, getattr(other, f"{name}_logits")) / 2 for x, name in pairs]
        return {"distill": weight * (terms[0] + terms[1])}

    def measures(self) -> Measures:
        """SQuAD's two, in percent as its own script gives them."""
        from torchmetrics.text import SQuAD

        return SQuAD()

    def update(self, measures: Any, output: Any, target: Any) -> None:
        """Add a batch."""
        predictions, references = self.answers(output, target)
        measures.update(predictions, references)


class DetectionTask:
    """A detector: its own loss plus channel-wise distillation (eq. 4) of feature maps; mean average precision.

    Args:
        layers: Names of the modules whose outputs, ``(N, C, H, W)``, the student learns from the teacher.
        loss: The detector's loss from its training outputs and the targets of a batch.
        predict: Boxes from its evaluation outputs, as ``torchmetrics.detection.MeanAveragePrecision`` takes them: a
            dict for each image with ``boxes`` ``(n, 4)`` in pixels as x1, y1, x2, y2, ``scores`` ``(n,)`` and
            ``labels`` ``(n,)``.
        collate: Puts samples together; the target is a list of dicts with ``boxes`` and ``labels``.
    """

    metric = "map"

    def __init__(
        self,
        layers: Sequence[str],
        *,
        loss: Callable[[Any, Any], Tensor],
        predict: Callable[[Any], list[dict[str, Tensor]]],
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not layers:
            raise TrainingError("channel-wise distillation needs the names of layers", hint="those of the neck")
        self.layers, self.loss, self.predict = tuple(layers), loss, predict
        self.collate = collate or stack_images

    def losses(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Any, target: Any, *, weight: float
    ) -> dict[str, Tensor]:
        """The detector's loss, and ``weight`` times the mean of eq. 4 over the layers."""
        if teacher is None:
            return {"task": self.loss(call(student, inputs), target)}
        with features(student, self.layers) as mine:
            output = call(student, inputs)
        with features(teacher, self.layers) as its:
            _quietly(teacher, inputs)
        terms = [channel_wise_distillation(mine[name], its[name]) for name in self.layers]
        return {"task": self.loss(output, target), "distill": weight * torch.stack(terms).mean()}

    def measures(self) -> Measures:
        """COCO's mean average precision: torchmetrics' own where torchvision is installed too, else by pycocotools."""
        if importlib.util.find_spec("pycocotools") is None:
            raise MissingExtraError("pycocotools", extra="torch", purpose="mean average precision")
        try:
            from torchmetrics.detection import MeanAveragePrecision
        except ImportError:
            from relu_deploy.distill.mean_ap import CocoMeanAveragePrecision

            return CocoMeanAveragePrecision()
        return MeanAveragePrecision(box_format="xyxy", iou_type="bbox")

    def update(self, measures: Any, output: Any, target: Any) -> None:
        """Add a batch."""
        measures.update(self.predict(output), target)


def make_task(name: str, classes: int | None) -> Task:
    """The task of a name where labels are all it needs; tokens with the label -100 do not count, as in torch.

    Raises:
        TrainingError: detection, which needs functions for its loss and boxes.
    """
    if name == "detection":
        raise TrainingError(
            "detection needs the names of layers, a loss and a function that makes boxes",
            hint="return a DetectionTask as the third value of the data function, or give task=",
        )
    if classes is None:
        raise TrainingError("the number of classes is not known", hint="make the task yourself")
    return LanguageTask(classes, ignore_index=-100) if name == "language" else ClassificationTask(classes)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits(output: Any) -> Tensor:
    """The logits among the outputs: the tensor itself, ``.logits``, or the first of a tuple.

    Raises:
        TrainingError: there are none.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits")
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TrainingError(f"the network gives a {type(output).__name__}, in which there are no logits")
    return found


def stack_images(samples: list[Any]) -> tuple[Tensor, list[Any]]:
    """Images ``(C, H, W)`` of one size as ``(N, C, H, W)``, targets as a list."""
    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise DataError(f"the images of a batch have several sizes, among them {sorted(shapes)[:2]}")
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


@contextlib.contextmanager
def features(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of named modules while the block runs; a wrapped model's names are those of what it wraps.

    Raises:
        TrainingError: there is no such module, or its output is no tensor.
    """
    inner = getattr(model, "module", model)
    found: dict[str, Tensor] = {}
    handles = []
    for name in layers:
        try:
            module = inner.get_submodule(name)
        except AttributeError:
            raise TrainingError(f"{type(inner).__name__} has no module {name!r} to distil") from None
        handles.append(module.register_forward_hook(_keeper(found, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in found]
    if missing:
        raise TrainingError(f"the module {missing[0]!r} did not run, or its output is no tensor")


def _keeper(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            found[name] = output

    return keep


def _quietly(teacher: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return call(teacher, inputs)
