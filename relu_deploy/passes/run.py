"""Apply the pipeline to a model, check the result, and say what was done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx
import onnx.inliner

from calib.errors import ToolkitError, first_line
from calib.ranges import Ranges
from relu_deploy import ops
from relu_deploy.errors import ModelError
from relu_deploy.graph import all_nodes, check_model, export_graph, import_graph
from relu_deploy.passes import PIPELINE
from relu_deploy.passes.approximate import Approximation, check_tolerance, describe, domains_of, measure
from relu_deploy.passes.bernoulli import spell_out_bernoulli
from relu_deploy.passes.certificate import is_exact
from relu_deploy.passes.collapse_within import collapse_within
from relu_deploy.passes.domain import Domains
from relu_deploy.passes.dyrelu_spell import spell_dyrelu
from relu_deploy.passes.fold_dynamic import (
    Folding,
    check_folding,
    describe_folding,
    fold_dynamic,
    gather_static,
    measure_folding,
)
from relu_deploy.passes.fold_dyrelu import Folded
from relu_deploy.passes.prelu import spell_prelu
from relu_deploy.passes.pwlu_spell import spell_pwlu
from relu_deploy.passes.recognise import recognise_pwlu
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.verify import Feed, Verification, compare
from relu_deploy.report import PassReport, Skip
from relu_deploy.targets import Target

# A pass may open the way for one before it (a collapsed region leaves a Relu behind an Identity); each round removes
# nodes or makes them Relu, so rounds end, and real networks need two.
MAX_ROUNDS = 8
# Passes that move values and compute none, or compute them by ONNX Runtime itself: not one bit may change.
_EXACT = (
    "inline_functions", "fold_constants", "remove_identities", "inline_branches", "merge_duplicates",
    "remove_dead_nodes",
)  # fmt: skip
# ONNX Runtime multiplies with weights that are stored in another order than with computed ones.
_PACKED = ("MatMul", "Gemm", "LSTM", "GRU")
_DRAWS = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What became of a network.

    Attributes:
        passes: One report a pass, in order; changed nodes of all rounds, skips of the last.
        nodes_before: Nodes of the main graph.
        nodes_after: The same of the result.
        exact: Whether every change keeps each float bit for bit.
        verification: The comparison of what is claimed to be the same network with the original; None when it was not
            asked for or nothing changed. Collapsing to a tolerance comes after it.
        approximation: What collapsing to a tolerance did, with every bound; None when it was not asked for.
        folding: What making dynamic units static did, with every bound; None when it was not asked for.
    """

    passes: tuple[PassReport, ...]
    nodes_before: int
    nodes_after: int
    exact: bool
    verification: Verification | None
    approximation: Approximation | None = None
    folding: Folding | None = None

    @property
    def changed(self) -> bool:
        """Whether the result differs from the original."""
        return any(report.changed for report in self.passes)


def rewrite(
    model: onnx.ModelProto,
    *,
    verify: bool = True,
    samples: Sequence[Feed] | None = None,
    seed: int = 0,
    collapse_tolerance: float | None = None,
    domain: tuple[float, float] | Ranges | None = None,
    fold_tolerance: float | None = None,
    target: Target | None = None,
) -> tuple[onnx.ModelProto, RewriteReport]:
    """Apply every pass until none changes anything, then check the result.

    Args:
        model: The network, with its external data loaded. Not changed.
        verify: Compare outputs with the original's in ONNX Runtime.
        samples: Inputs for that comparison; random ones by default.
        seed: Of the random inputs.
        collapse_tolerance: Also replace regions by Relu that are off by at most this much, in units of the tensor; 0
            accepts what is exactly ReLU on ``domain``. None: only what is exactly ReLU everywhere.
        domain: Where that has to hold: a range for every region's input, or ranges that were measured on ``model``;
            None: every finite number of the type.
        fold_tolerance: Also make a DY-ReLU static where ``domain``, which has to be ranges then, shows that this moves
            its output by at most this much, in its units; before anything is collapsed to a tolerance.
        target: Also spell learned activations for this runtime; None: each stays one node with its definition.

    Returns:
        The rewritten network and the report. Where no pass changes anything the network is ``model`` itself: files that
        carry its fingerprint stay valid.

    Raises:
        ModelError: the result fails onnx's checker, or a local function and its calls do not fit together.
        CheckFailedError: the result does not compute what the original computes.
        RangesError: ``domain`` was measured on another network.
        ToolkitError: the tolerance or the range makes no sense, or there is a domain and no tolerance.
    """
    domains = domains_of(domain, model)
    if fold_tolerance is not None:
        check_folding(fold_tolerance, domain)
    if collapse_tolerance is not None:
        check_tolerance(collapse_tolerance)
    elif domain is not None and fold_tolerance is None:
        raise ToolkitError(
            "a domain says nothing without a tolerance", hint="give a collapse tolerance too; 0 accepts no difference"
        )
    options = _Check(verify, samples, seed)
    result, report = _rewrite_exactly(model, options)
    units: tuple[Folded, ...] = ()
    if fold_tolerance is not None and isinstance(domain, Ranges):
        result, report, units = _fold_dynamic(result, report, fold_tolerance, domain, options)
    if collapse_tolerance is not None:
        result, report = _collapse_within(result, report, collapse_tolerance, domains, options)
    if units:  # after collapsing, since it moves scales and shifts into layers, whose ranges are then unknown
        result, report = _gather_static(result, report, units, options)
    if target is not None:
        same = report.approximation is None and report.folding is None
        result, report = _spell(result, report, target, options, reference=model if same else result)
    return result, report


def spell(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """Spell activations that have no quick operator of their own in those that suit a target.

    Learned activations that :func:`rewrite` left as one node each; for ``ort`` also PReLU with slopes for channels and
    DY-ReLU.

    Args:
        model: Not changed.
        target: The runtime that will run it in float; quantising spells them by itself.

    Returns:
        The network and the reports; where there is nothing to spell, ``model`` itself.

    Raises:
        ModelError: the result fails onnx's checker.
    """
    graph = import_graph(model)
    annotate(graph, model)
    if graph.opset < ops.DEFINITION_OPSET:  # what could not stay one node
        recognise_pwlu(graph, for_file=False)
    reports = [spell_pwlu(graph, target)]
    if target == "ort":
        reports += [spell_prelu(graph), spell_dyrelu(graph)]
    if not any(report.changed for report in reports):
        return model, tuple(reports)
    result = export_graph(graph, model)
    check_model(result, "the network")
    return result, tuple(reports)


@dataclasses.dataclass(frozen=True)
class _Check:
    """How results are compared."""

    verify: bool
    samples: Sequence[Feed] | None
    seed: int


def _rewrite_exactly(model: onnx.ModelProto, options: _Check) -> tuple[onnx.ModelProto, RewriteReport]:
    """What keeps the network the same, up to rounding."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    # Our own operators are what passes look for; their definitions are for runtimes.
    inlined = tuple(f"{f.domain}.{f.name}" for f in source.functions if not ops.is_definition(f))
    if inlined:
        source = inline_functions(source)
    result, reports = _apply(source)
    reports = [PassReport("inline_functions", inlined), *reports] if inlined else reports
    exact = all(_is_exact(report) for report in reports) and not _stores_weights(source, result)
    before = len(model.graph.node)
    if not any(report.changed for report in reports):
        return model, RewriteReport(tuple(reports), before, before, exact, None)
    check_model(result, "the rewritten network")
    spelled = spell_out_bernoulli(source)
    reference = model if spelled is source else spelled
    checked = _verify(reference, result, exact, options) if options.verify else None
    return result, RewriteReport(tuple(reports), before, len(result.graph.node), exact, checked)


def _fold_dynamic(
    model: onnx.ModelProto, report: RewriteReport, tolerance: float, ranges: Ranges, options: _Check
) -> tuple[onnx.ModelProto, RewriteReport, tuple[Folded, ...]]:
    """Make dynamic units static, measure what that changes, and clean up exactly behind it."""
    static, found, units = fold_dynamic(model, ranges, tolerance)
    folding = describe_folding(units, tolerance)
    if not units:
        passes = tuple(_join(list(report.passes), [found]))
        return model, dataclasses.replace(report, passes=passes, folding=folding), ()
    if options.verify:
        folding = measure_folding(model, static, units, tolerance, samples=options.samples, seed=options.seed)
    result, report = _clean(static, report, found, options)
    return result, dataclasses.replace(report, exact=False, folding=folding), units


def _gather_static(
    model: onnx.ModelProto, report: RewriteReport, units: tuple[Folded, ...], options: _Check
) -> tuple[onnx.ModelProto, RewriteReport]:
    """Find the cheapest form of what is left of static units."""
    gathered, found = gather_static(model, units)
    return _clean(gathered, report, found, options, like=model) if found.changed else (model, report)


def _clean(
    model: onnx.ModelProto, report: RewriteReport, found: PassReport, options: _Check,
    like: onnx.ModelProto | None = None,
) -> tuple[onnx.ModelProto, RewriteReport]:  # fmt: skip
    """The exact passes behind another one, checked against ``like`` or ``model``."""
    result, cleaned = _apply(model)
    check_model(result, "the rewritten network")
    if options.verify:
        exact = like is None and all(_is_exact(entry) for entry in cleaned) and not _stores_weights(model, result)
        _verify(like or model, result, exact, options)
    passes = tuple(_join(_join(list(report.passes), [found]), cleaned))
    return result, dataclasses.replace(report, passes=passes, nodes_after=len(result.graph.node))


def _collapse_within(
    model: onnx.ModelProto, report: RewriteReport, tolerance: float, domains: Domains, options: _Check
) -> tuple[onnx.ModelProto, RewriteReport]:
    """Rounds of collapsing to a tolerance, each cleaned up exactly behind it, until nothing is left to collapse."""
    passes, done, result = list(report.passes), Approximation(tolerance, ()), model
    for _ in range(MAX_ROUNDS):
        graph = import_graph(result)
        annotate(graph, result)
        found, collapsed = collapse_within(graph, tolerance=tolerance, domains=domains)
        passes = _join(passes, [found])
        if not collapsed:
            break
        before = result
        result, cleaned = _apply(export_graph(graph, before))
        passes = _join(passes, [entry for entry in cleaned if entry.name != found.name])
        check_model(result, "the rewritten network")
        now = describe(collapsed, tolerance)
        if options.verify:
            now = measure(before, result, collapsed, tolerance, samples=options.samples, seed=options.seed)
        done = dataclasses.replace(now, collapses=(*done.collapses, *now.collapses))
    if len(done.collapses) and options.verify and not done.note:
        outputs = measure(model, result, (), tolerance, samples=options.samples, seed=options.seed).outputs
        done = dataclasses.replace(done, outputs=outputs)
    return result, dataclasses.replace(
        report,
        passes=tuple(passes),
        nodes_after=len(result.graph.node),
        exact=report.exact and not done.collapses,
        approximation=done,
    )


def _spell(
    model: onnx.ModelProto, report: RewriteReport, target: Target, options: _Check, *, reference: onnx.ModelProto
) -> tuple[onnx.ModelProto, RewriteReport]:
    """Spell for a target, and compare with what it has to be the same as."""
    result, spelled = spell(model, target)
    report = dataclasses.replace(report, passes=tuple(_join(list(report.passes), list(spelled))))
    if not any(entry.changed for entry in spelled):
        return model, report
    checked = _verify(reference, result, False, options) if options.verify else None
    return result, dataclasses.replace(
        report, nodes_after=len(result.graph.node), exact=False, verification=checked or report.verification
    )


def _join(first: list[PassReport], second: list[PassReport]) -> list[PassReport]:
    """Reports of the same passes as one; what the later one skipped counts."""
    later = {report.name: report for report in second}
    joined = [_merge(report, later.pop(report.name)) if report.name in later else report for report in first]
    return [*joined, *later.values()]


def _verify(model: onnx.ModelProto, result: onnx.ModelProto, exact: bool, options: _Check) -> Verification:
    """Compare the two, unless what is left draws at random: then two runs of one network differ."""
    if any(node.op_type in _DRAWS for node in all_nodes(result.graph)):
        return Verification(0, note="the network draws at random, so two runs of it differ")
    return compare(model, result, exact=exact, samples=options.samples, seed=options.seed)


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Unfold local functions but our own. The checker does not compare a call with the function's inputs; this does.

    Raises:
        ModelError: a local function and its calls do not fit together.
    """
    try:
        ours = [(function.domain, function.name) for function in model.functions if ops.is_definition(function)]
        return onnx.inliner.inline_selected_functions(model, ours, exclude=True)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"a local function of the network cannot be unfolded: {first_line(error)}",
            hint="its calls and its definition do not fit together; export the model again",
        ) from error


def _apply(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[PassReport]]:
    """Rounds of the pipeline; shapes are inferred anew each round, since folded constants make more of them known."""
    merged = {function.__name__: PassReport(function.__name__) for function in PIPELINE}
    for _ in range(MAX_ROUNDS):
        graph = import_graph(model)
        annotate(graph, model)
        reports = [function(graph) for function in PIPELINE]
        for report in reports:
            merged[report.name] = _merge(merged[report.name], report)
        if not any(report.changed for report in reports):
            break
        model = export_graph(graph, model)
    return model, [*merged.values(), *_subgraph_report(model)]


def _merge(sum_of: PassReport, new: PassReport) -> PassReport:
    changed = dict.fromkeys((*sum_of.changed, *new.changed))
    return PassReport(new.name, tuple(changed), new.skipped, {**sum_of.notes, **new.notes})


def _subgraph_report(model: onnx.ModelProto) -> list[PassReport]:
    """Nodes with graphs inside them, which the passes do not enter."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    skips = tuple(
        Skip(node.name, f"the graphs inside {node.op_type} are not rewritten")
        for node in model.graph.node
        if any(attribute.type in kinds for attribute in node.attribute)
    )
    return [PassReport("subgraphs", (), skips)] if skips else []


def _stores_weights(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    """Whether products read stored numbers that were computed before, so that a runtime may sum in another order."""
    stored, were = _stored(after), _stored(before)
    products = (node for node in all_nodes(after.graph) if node.op_type in _PACKED)
    return any(name in stored and name not in were for node in products for name in node.input)


def _stored(model: onnx.ModelProto) -> set[str]:
    """Names of initialisers and of what Constant nodes give."""
    constants = {node.output[0] for node in all_nodes(model.graph) if node.op_type == "Constant"}
    return constants | {tensor.name for tensor in model.graph.initializer}


def _is_exact(report: PassReport) -> bool:
    return (
        not report.changed
        or report.name in _EXACT
        or (bool(report.notes) and all(is_exact(note) for note in report.notes.values()))
    )
