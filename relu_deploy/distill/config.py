"""How a student is trained: one frozen value, from keywords or a TOML file, stored in checkpoints and reports."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from calib.errors import FileError
from calib.files import require_file
from relu_deploy.errors import TrainingError
from relu_deploy.nn.schedule import PURE_SHARE

RecipeName = Literal["B", "KD", "B+KD", "B+KD-SAT", "PEA-W", "PEA-S", "PWLU", "iterative"]
TaskName = Literal["classification", "detection", "language"]
RECIPE_NAMES: tuple[RecipeName, ...] = get_args(RecipeName)
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """How a smooth activation becomes ReLU; each recipe reads what concerns it.

    Attributes:
        pure: Share of the steps at the end that train plain ReLU (SAT, PEA).
        initial: Share of the steps before PEA's transition.
        continuous: SAT falls at every step and not in ten steps of 0.1.
        statistics: Share of the steps in PWLU's phase I.
        realign: PWLU moves its intervals to the collected statistics; without it they stay at +-``bound``.
        intervals: Of PWLU.
        bound: Of PWLU before the realignment, in units of the activation's input.
        kernel: How PWLU is computed on a CPU: ``blocks``, or ``compiled``, which needs a C++ compiler and is several
            times as fast (:func:`relu_deploy.nn.pwlu_model.use_kernel`). A resumed training keeps it.
        groups: Of the iterative recipe.
    """

    pure: float = PURE_SHARE
    initial: float = 5 / 120
    continuous: bool = False
    statistics: float = 0.1
    realign: bool = True
    intervals: int = 16
    bound: float = 3.0
    kernel: Literal["blocks", "compiled"] = "blocks"
    groups: int = 4

    def __post_init__(self) -> None:
        shares = {"pure": self.pure, "initial": self.initial, "statistics": self.statistics}
        for name, value in shares.items():
            _check(0 <= value < 1, name, value, "in [0, 1)")
        _check(self.intervals >= 1, "intervals", self.intervals, "1 or more")
        _check(math.isfinite(self.bound) and self.bound > 0, "bound", self.bound, "positive")
        _check(self.groups >= 1, "groups", self.groups, "1 or more")
        _check(self.kernel in ("blocks", "compiled"), "kernel", self.kernel, "blocks or compiled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How to train a student.

    Attributes:
        recipe: ``B`` trains the original with the task's loss. ``KD`` starts a ReLU student from random weights, all
            others from the original's; ``B+KD`` swaps at once, ``B+KD-SAT``, ``PEA-W`` and ``PEA-S`` step by step,
            ``iterative`` group after group, ``PWLU`` puts learned piecewise-linear units in place.
        task: What kind of network it is; decides losses and metrics.
        epochs: Passes over the training data.
        batch_size: Samples a step over all processes together, so that more processes do not change the training.
            The last, smaller batch of an epoch is left out; shuffling makes it another one each time.
        learning_rate: Peak of the one-cycle schedule (linear warm-up over a tenth, then half a cosine down to 1 %).
        weight_decay: Of AdamW, for parameters of two or more axes; biases, norms and activations are not decayed.
        seed: Decides the order of the samples, first weights of ``KD``, and whatever the model draws.
        weights: Where the student starts; ``recipe`` is as said above.
        loss: ``distill`` is the task's distillation loss, ``task`` its labels alone; ``recipe`` is ``task`` for ``B``.
        distill_weight: Factor of the distillation where it is added to the task's loss (detection).
        clip_norm: Largest norm of the gradient; None does not clip.
        precision: ``bf16`` and ``fp16`` run the student under autocast.
        workers: Processes that load data. With random numbers in the data set, a resume is exact from an epoch's end.
        channels_last: Images in the memory format that CPUs' and GPUs' convolutions like best.
        keep: Shell patterns of activations to leave, as ``replace_activations`` takes them.
        include: Shell patterns of gates, heads and squeeze-excites to replace all the same.
        checkpoint_steps: A checkpoint also every so many steps; 0 is each epoch only.
        log_steps: A line in ``metrics.jsonl`` every so many steps.
        evaluate_epochs: Evaluate every so many epochs, and after the last.
        transition: How the activations change.
    """

    recipe: RecipeName = "B+KD"
    task: TaskName = "classification"
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    weights: Literal["recipe", "original", "random"] = "recipe"
    loss: Literal["recipe", "distill", "task"] = "recipe"
    distill_weight: float = 1.0
    clip_norm: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = 0
    channels_last: bool = False
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    checkpoint_steps: int = 0
    log_steps: int = 50
    evaluate_epochs: int = 1
    transition: TransitionConfig = dataclasses.field(default_factory=TransitionConfig)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise TrainingError(f"{name} is {value!r}", hint=f"one of {', '.join(choices)}")
        for name in ("epochs", "batch_size", "log_steps", "evaluate_epochs"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("workers", "checkpoint_steps", "seed"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(
            0 < self.learning_rate <= 1e6, "learning_rate", self.learning_rate, "positive, and no more than a million"
        )
        _check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        _check(0 <= self.distill_weight < math.inf, "distill_weight", self.distill_weight, "0 or more")
        if self.clip_norm is not None:
            _check(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")

    @property
    def from_random(self) -> bool:
        """The student starts from random weights."""
        return self.weights == "random" or (self.weights == "recipe" and self.recipe == "KD")

    @property
    def distils(self) -> bool:
        """The teacher takes part in the loss."""
        return self.loss == "distill" or (self.loss == "recipe" and self.recipe != "B")


_CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": RECIPE_NAMES,
    "task": TASK_NAMES,
    "weights": ("recipe", "original", "random"),
    "loss": ("recipe", "distill", "task"),
    "precision": ("no", "bf16", "fp16"),
}


def to_dict(config: DistillConfig) -> dict[str, Any]:
    """Plain values, as JSON holds them; :func:`from_dict` takes them back."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_dict(values: Mapping[str, Any], *, source: str = "the configuration") -> DistillConfig:
    """A configuration from plain values; the table ``transition`` holds the fields of :class:`TransitionConfig`.

    Raises:
        TrainingError: a key is unknown (the nearest known one is named), or a value has the wrong type or size.
    """
    fields = dict(values)
    inner = fields.pop("transition", {})
    if not isinstance(inner, Mapping):
        raise TrainingError(f"{source}: transition is {inner!r}, not a table", hint="[transition]")
    checked = _typed(DistillConfig, fields, source)
    checked["transition"] = TransitionConfig(**_typed(TransitionConfig, inner, f"{source}, [transition]"))
    return DistillConfig(**checked)


def parse_setting(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``; the value is JSON, or else text.

    Raises:
        TrainingError: there is no ``=``.

    >>> parse_setting("transition.pure=0.3"), parse_setting("loss=task"), parse_setting("clip_norm=null")
    (('transition.pure', 0.3), ('loss', 'task'), ('clip_norm', None))
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise TrainingError(f"cannot read the setting {text!r}", hint="write NAME=VALUE, as transition.pure=0.3")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One set of values from several, the later ones before the earlier; ``a.b`` is ``b`` in the table ``a``.

    >>> layered({"epochs": 2, "transition": {"pure": 0.5, "groups": 3}}, {"transition.pure": 0.3})
    {'epochs': 2, 'transition': {'pure': 0.3, 'groups': 3}}
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            table, dot, key = name.partition(".")
            inner = {key: value} if dot else value
            both = isinstance(found.get(table), Mapping) and isinstance(inner, Mapping)
            found[table] = {**found[table], **inner} if both else inner
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file, not checked yet: options of the command line may still replace some.

    Raises:
        FileError: it is missing, larger than a megabyte, or no TOML.
    """
    try:
        tomllib = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        raise FileError(f"reading {path} needs Python 3.11", hint="give the options on the command line") from None
    require_file(path, to="read the configuration")
    if path.stat().st_size > _MAX_BYTES:
        raise FileError(f"{path} is larger than {_MAX_BYTES} bytes, so it is no configuration")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is not valid TOML: {error}") from error
    return values


def _typed(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values with the types of a dataclass's defaults: an int may stand for a float, a list for a tuple."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            raise TrainingError(
                f"{source} has no option {name!r}",
                hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(defaults)}",
            )
        checked[name] = _converted(value, defaults[name], f"{source}: {name}")
    return checked


def _converted(value: Any, default: Any, what: str) -> Any:
    if isinstance(default, tuple) and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    wanted = float if default is None or isinstance(default, float) else type(default)
    if value is None and default is None:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise TrainingError(f"{what} is {value!r}, which is no {wanted.__name__}")


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise TrainingError(f"cannot train with {name} = {value}: it must be {wanted}")
