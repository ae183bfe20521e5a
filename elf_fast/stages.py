"""Cuts a network into stages at the outputs of named modules.

`cut` records the network in training and in evaluation mode, makes one graph for both, and cuts it.
It records every mode several times and refuses a forward that does not do the same each time.
A stage shares the network's modules and parameters under their own names.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .modes import mode
from .tracing import (
    BY_HAND,
    Constant,
    Trace,
    Tracer,
    check_calls,
    record,
    spell,
    spell_targets,
)

__all__ = ["cut", "work_on_copy"]


def cut(backbone: nn.Module, exits: Sequence[str]) -> list[fx.GraphModule]:
    """The len(exits) + 1 stages of a network, cut after each named module.

    Raises:
        ValueError: see `models.from_backbone`.
    """
    check_calls(backbone, exits)
    traces = []
    for training in (True, False):
        with mode(backbone, training=training):
            traces.append(record(backbone, exits))
            _check_repeats(traces[-1], record(backbone, exits))
            others = record(backbone, exits, other_contexts=True)
            _check_repeats(traces[-1], others, constants=False)  # autocast may change their dtype
    trace = _follow_mode(*traces)
    _drop_unused_sizes(trace.graph)
    _check_order(trace, exits)
    _check_cuts(trace, exits)
    return [_stage(trace, e, type(backbone).__name__) for e in range(len(exits) + 1)]


class _ByMode(nn.Module):
    """A number that a forward derives from `self.training`, such as attention's dropout rate."""

    def __init__(self, in_training: Any, in_evaluation: Any) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self) -> Any:
        return self.in_training if self.training else self.in_evaluation


class _Different(Exception):
    """Two traces differ in more than numbers: .args are the nodes."""


def _check_repeats(first: Trace, again: Trace, *, constants: bool = True) -> None:
    """Two records of one mode must be equal, numbers included."""

    def refuse(once: str, then: str) -> None:
        raise ValueError(
            "backbone: expected a forward that does the same every time around the named modules, "
            f"with and without gradients and autocast, got {once} once and {then} another time; "
            "the stages would lose the random number, state or context that it depends on; move "
            f"it into a module of its own that contains no exit, or {BY_HAND}"
        ) from None

    try:
        _merge(first, again, lambda node, a, b: refuse(f"{a} in {spell(node)}", f"{b}"), constants)
    except _Different as different:
        once, then = map(spell, different.args)
        refuse(once, then if then != once else "the same with other values")


def _follow_mode(training: Trace, evaluation: Trace) -> Trace:
    """One trace for both modes. Tracing stores `self.training`, and values derived from it, as
    plain numbers in the graph. A number that differs between the traces becomes a `_ByMode`."""
    parts = dict(training.parts)

    def choose(node: fx.Node, a: Any, b: Any) -> fx.Node:
        name = f"_by_mode_{len(parts)}"
        parts[name] = _ByMode(a, b)
        with node.graph.inserting_before(node):
            return node.graph.call_module(name)

    try:
        _merge(training, evaluation, choose)
    except _Different as different:
        a, b = different.args
        raise ValueError(
            "backbone: expected a forward that runs the same operations in training and in "
            f"evaluation around the named modules, got {spell(a)} in training and {spell(b)} "
            f"in evaluation; {BY_HAND}"
        ) from None
    return Trace(training.graph, training.cuts, parts)


def _merge(
    one: Trace, other: Trace, choose: Callable[[fx.Node, Any, Any], Any], constants: bool = True
) -> None:
    """Replaces the numbers of `one` that differ in `other` by choose(node, number, other number).

    Raises:
        _Different: the traces differ in more than numbers. Without `constants`, those are not
            compared.
    """
    ours, theirs = list(one.graph.nodes), list(other.graph.nodes)
    index = {node: i for nodes in (ours, theirs) for i, node in enumerate(nodes)}

    def merge(node: fx.Node, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and index[a] == index[b]:
            return a
        if isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float)):
            same = type(a) is type(b) and (a == b or (a != a and b != b))
            return a if same else choose(node, a, b)
        if isinstance(a, slice) and isinstance(b, slice):
            fields = ("start", "stop", "step")
            return slice(*(merge(node, getattr(a, f), getattr(b, f)) for f in fields))
        if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) == list(b):
            return {key: merge(node, a[key], b[key]) for key in a}
        if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
            items = [merge(node, u, v) for u, v in zip(a, b, strict=True)]
            return tuple(items) if isinstance(a, tuple) else items
        if isinstance(a, fx.Node) or isinstance(b, fx.Node) or a != b:
            raise _Different
        return a

    # Only the last node of a graph is its output. So if the nodes compared here are equal, up to
    # the end of the shorter graph, neither graph is longer.
    for a, b in zip(ours, theirs, strict=False):
        try:
            if (a.op, a.target) != (b.op, b.target):
                raise _Different
            if constants and not _same_constant(a, one, other):
                raise _Different
            a.args, a.kwargs = merge(a, a.args, b.args), merge(a, a.kwargs, b.kwargs)
        except _Different:
            raise _Different(a, b) from None


def _same_constant(node: fx.Node, one: Trace, other: Trace) -> bool:
    if node.op not in ("get_attr", "call_module"):
        return True
    a, b = one.parts[str(node.target)], other.parts[str(node.target)]
    return a is b or (
        isinstance(a, Constant) and isinstance(b, Constant) and torch.equal(a.value, b.value)
    )


def _drop_unused_sizes(graph: fx.Graph) -> None:
    """Removes reads of shapes that nothing uses: in `B, C, H, W = x.shape` a C that is never read
    would count as a value that crosses a cut. Only nodes known to have no side effect are removed;
    `x.add_(1)` has no reader either, and must stay."""

    def may_have_effects(node: fx.Node) -> bool:
        return not (
            node.op == "get_attr"
            or (node.op == "call_method" and node.target in ("size", "dim"))
            or (node.op == "call_function" and node.target in (getattr, operator.getitem))
        )

    graph.eliminate_dead_code(may_have_effects)


def _check_order(trace: Trace, exits: Sequence[str]) -> None:
    position = {node: i for i, node in enumerate(trace.graph.nodes)}
    at = [position[cut] for cut in trace.cuts]
    for i, p in enumerate(at):
        if p in at[:i]:
            raise ValueError(
                f'exits: expected modules with outputs of their own, got "{exits[at.index(p)]}" '
                f'and "{exits[i]}", which return the same tensor'
            )
    if at != sorted(at):
        order = [name for _, name in sorted(zip(at, exits, strict=True))]
        raise ValueError(f"exits: expected the order in which they run, {order}, got {list(exits)}")
    output = trace.graph.output_node()
    if not isinstance(output.args[0], fx.Node):
        raise ValueError(
            "backbone: expected a forward that returns logits [N, C], "
            f"got {type(output.args[0]).__name__}"
        )
    if output.args[0] is trace.cuts[-1]:
        raise ValueError(
            f'exits: expected something left to run after the last exit, got "{exits[-1]}", '
            "which returns the network's own output"
        )


def _stage_of(trace: Trace) -> Callable[[fx.Node], int]:
    """A function from a node to the stage that it runs in. A cut is the last node of its stage."""
    position = {node: i for i, node in enumerate(trace.graph.nodes)}
    at = [position[cut] for cut in trace.cuts]
    return lambda node: bisect_left(at, position[node])


def _movable(trace: Trace) -> set[fx.Node]:
    """Nodes that read only parameters, buffers and numbers; any stage that needs one repeats it."""
    movable: set[fx.Node] = set()
    for node in trace.graph.nodes:
        helper = node.op == "call_module" and isinstance(
            trace.parts[node.target], (_ByMode, Constant)
        )
        name = str(getattr(node.target, "__name__", node.target))
        writes = name.endswith("_") and not name.endswith("__")  # as x.add_(1) does
        is_call = node.op in ("call_function", "call_method")
        pure = is_call and not writes and movable.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or helper or pure:
            movable.add(node)
    return movable


def _check_cuts(trace: Trace, exits: Sequence[str]) -> None:
    """Only the exit's output may cross the cut after it. Samples leave the batch there, so another
    tensor would have too many rows, and an integer such as the batch size would be wrong."""
    stage_of = _stage_of(trace)
    movable = _movable(trace)
    for e, (name, cut) in enumerate(zip(exits, trace.cuts, strict=True)):
        crossing = []
        for node in trace.graph.nodes:
            readers = [user for user in node.users if stage_of(user) > e]
            if node is not cut and node not in movable and stage_of(node) <= e and readers:
                crossing.append(f"{spell(node)} (read by {spell(readers[0])})")
        if crossing:
            raise ValueError(
                f'exits: expected that only the output of "{name}" crosses the cut after it, '
                f"got also {', '.join(crossing)}"
            )


def _stage(trace: Trace, e: int, kind: str) -> fx.GraphModule:
    stage_of = _stage_of(trace)
    movable = _movable(trace)
    graph = fx.Graph(tracer_cls=Tracer)
    copies: dict[fx.Node, fx.Node] = {}
    if e > 0:
        copies[trace.cuts[e - 1]] = graph.placeholder("features")

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in trace.graph.nodes:
        if node not in movable and stage_of(node) == e:
            copy(node)
    if e < len(trace.cuts):
        graph.output(copies[trace.cuts[e]])
    _check_free(graph)
    spell_targets(graph)
    return fx.GraphModule(trace.parts, graph, class_name=f"{kind}Stage{e}")


def _check_free(graph: fx.Graph) -> None:
    """A module of the backbone must not have the name of one of GraphModule's own attributes."""
    taken = set(dir(fx.GraphModule({}, fx.Graph()))) - set(dir(nn.Module()))
    for node in graph.nodes:
        first = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and first in taken:
            raise ValueError(
                f'backbone: expected no attribute called "{first}" at its top, because '
                f'torch.fx.GraphModule has one of its own, got "{node.target}"; rename it, or '
                f"{BY_HAND}"
            )


def work_on_copy(stage: nn.Module) -> None:
    assert isinstance(stage, fx.GraphModule)
    features = next(iter(stage.graph.nodes))
    readers = list(features.users)
    with stage.graph.inserting_after(features):
        own = stage.graph.call_method("clone", (features,))
    for reader in readers:
        reader.replace_input_with(features, own)
    stage.recompile()
