"""Cuts a network into stages at the outputs of named modules, with torch.fx.

Only the modules that contain the named ones (their ancestors) are traced; every other module is
called as it is. Tracing runs Python code once and records what it does to the input, so `cut`
refuses what a record cannot hold: contexts such as `torch.no_grad()`, hooks, random decisions.
"""

from __future__ import annotations

import contextlib
import functools
import json
import keyword
import operator
import pickle
import random
import re
import sys
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from .modes import mode

__all__ = ["BY_HAND", "Tracer", "cut", "work_on_copy"]

#: The end of a message about a network that cannot be cut.
BY_HAND = "build elf_fast.ELF from stages and heads by hand"


def cut(backbone: nn.Module, exits: Sequence[str]) -> list[fx.GraphModule]:
    """The len(exits) + 1 stages of a network, cut after each named module.

    Raises:
        ValueError: see `models.from_backbone`.
    """
    _check_calls(backbone, exits)
    traces = []
    for training in (True, False):
        with mode(backbone, training=training):
            traces.append(_trace(backbone, exits))
            _trace(backbone, exits, other_contexts=True)
    trace = _follow_mode(*traces)
    _drop_unused_sizes(trace.graph)
    _check_order(trace, exits)
    _check_cuts(trace, exits)
    return [_stage(trace, e, type(backbone).__name__) for e in range(len(exits) + 1)]


def _ancestors(backbone: nn.Module, exits: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that contain an exit and that tracing opens, by name; "" is the backbone."""
    found = {"": backbone}
    for name in exits:
        atoms = name.split(".")
        for depth in range(1, len(atoms)):
            path = ".".join(atoms[:depth])
            found[path] = backbone.get_submodule(path)
    return found


def _check_calls(backbone: nn.Module, exits: Sequence[str]) -> None:
    """The modules that tracing opens are not called in the stages; their operations are. So their
    hooks would not run, and torch.fx reads the backbone's forward from its class."""
    for name, module in _ancestors(backbone, exits).items():
        spelt = f'"{name}"' if name else type(module).__name__
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                      "_backward_pre_hooks"):  # fmt: skip
            if getattr(module, hooks):
                raise ValueError(
                    f"backbone: expected no hook on {spelt}, which contains an exit, because the "
                    f"stages do not call it, got {len(getattr(module, hooks))} in {hooks}; remove "
                    f"it or register it on a module that contains no exit"
                )
    if "forward" in vars(backbone):
        raise ValueError(
            f"backbone: expected the forward of its class, got a {type(backbone).__name__} whose "
            f"forward was replaced; {BY_HAND}"
        )


class _Autograd(NamedTuple):
    """What contexts such as `torch.no_grad()` and `torch.autocast` set."""

    inference: bool
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # device type, enabled, dtype

    @classmethod
    def now(cls, devices: Sequence[str]) -> _Autograd:
        autocast = ((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), tuple(autocast))

    def spell(self, outside: _Autograd) -> str:
        """The context that leads from `outside` to this state, for messages."""
        if self.inference != outside.inference:
            return "torch.inference_mode()"
        if self.grad != outside.grad:
            off = "torch.no_grad() or in a torch.autograd.Function"
            return "torch.enable_grad()" if self.grad else off
        changed = [mine for mine in self.autocast if mine not in outside.autocast]
        device, enabled, _ = changed[0]
        return f'torch.autocast("{device}", enabled={enabled})'


class Tracer(fx.Tracer):
    """Traces into the ancestors of the exits only, and records the values that the exits return.
    Without exits it traces the forward of one module and calls its submodules as they are.

    The arguments have defaults because unpickling a stage traces it again, with a tracer that is
    made without arguments.

    Attributes:
        lost: what the forward does that a graph cannot hold, for messages; None if nothing.
    """

    proxy_buffer_attributes = True

    def __init__(self, backbone: nn.Module | None = None, exits: Sequence[str] = ()) -> None:
        super().__init__()
        self.exits: dict[nn.Module, str] = {}
        self.ancestors: set[nn.Module] = set()
        self.outputs: dict[str, list[Any]] = {name: [] for name in exits}
        self.lost: str | None = None
        self.devices: list[str] = []
        if backbone is not None:
            self.exits = {backbone.get_submodule(name): name for name in exits}
            self.ancestors = set(_ancestors(backbone, exits).values())
            self.devices = _autocast_devices(backbone)
        self.outside = _Autograd.now(self.devices)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        graph = super().trace(root, concrete_args)
        _spell_targets(graph)
        return graph

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if self.exits and self.lost is None and kind.startswith("call"):
            inside = _Autograd.now(self.devices)
            if _is_checkpointed():
                self.lost = f"{_spell(node)} under gradient checkpointing"
            elif inside != self.outside:
                self.lost = f"{_spell(node)} under {inside.spell(self.outside)}"
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.ancestors

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes one input; other arguments of the forward keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # Not `forward`, which also runs global hooks. In them a proxy would be a surprise.
        value = super().call_module(m, m.forward, args, kwargs)
        if m in self.exits:
            self.outputs[self.exits[m]].append(value)
        return value


def _is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint is among the callers."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False


class _Trace(NamedTuple):
    graph: fx.Graph
    cuts: list[fx.Node]  # one per exit: the value its module returns
    parts: dict[str, Any]  # target of a get_attr or call_module node -> tensor or module


class _ByMode(nn.Module):
    """A number that a forward derives from `self.training`, such as attention's dropout rate."""

    def __init__(self, in_training: Any, in_evaluation: Any) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self) -> Any:
        return self.in_training if self.training else self.in_evaluation


class _Constant(nn.Module):
    """A tensor that a forward reads and that is not in the backbone's `state_dict`."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


def _trace(backbone: nn.Module, exits: Sequence[str], *, other_contexts: bool = False) -> _Trace:
    """The trace under gradients without autocast; with `other_contexts` the other way round, which
    shows contexts that the former hides: torch.autocast(enabled=False), torch.enable_grad()."""
    failure: Exception | None = None
    with _contexts(backbone, other=other_contexts):
        tracer = Tracer(backbone, exits)
        before = _random_states(tracer.ancestors)
        attributes = {module: dict(vars(module)) for module in tracer.ancestors}
        try:
            graph, parts = _record(tracer, backbone)
        except Exception as error:  # a forward that is given proxies can raise anything
            failure = error
        changed = _restore(attributes, backbone)
        if changed:
            tracer.lost = f"an attribute that the forward sets, {changed[0]}"
        if _random_states(tracer.ancestors) != before:
            tracer.lost = "a random number that is drawn while the forward is recorded"
    if tracer.lost is not None:
        raise ValueError(
            "backbone: expected a forward that torch.fx can record around the named modules, got "
            f"{tracer.lost}, which the stages would lose; move it into a module of its own that "
            f"contains no exit, or {BY_HAND}"
        ) from failure
    if failure is not None:
        raise ValueError(
            "backbone: expected a forward(x) that torch.fx can trace around the named modules, "
            f"without decisions on the data or its shape; {type(backbone).__name__} raised "
            f"{type(failure).__name__}: {textwrap.shorten(str(failure), 120)}; {BY_HAND}"
        ) from failure
    return _Trace(graph, [_cut(backbone, name, tracer.outputs[name]) for name in exits], parts)


def _record(tracer: Tracer, backbone: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph, and what its nodes call and read, by target."""
    graph = tracer.trace(backbone)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            parts[node.target] = backbone.get_submodule(node.target)
        elif node.op == "get_attr":
            _read_attribute(backbone, node, parts)
            constant = parts[node.target]
            if isinstance(constant, _Constant) and not constant.value.is_leaf:
                tracer.lost = "a tensor that Python computes from parameters"
    return graph, parts


def _autocast_devices(backbone: nn.Module) -> list[str]:
    used = {"cpu", "cuda"} | {p.device.type for p in backbone.parameters()}
    return sorted(filter(torch.amp.is_autocast_available, used))


@contextlib.contextmanager
def _contexts(backbone: nn.Module, *, other: bool) -> Iterator[None]:
    """Gradients on and autocast off; with `other`, gradients off and autocast on."""
    before = {d: torch.is_autocast_enabled(d) for d in _autocast_devices(backbone)}
    with torch.inference_mode(False), torch.set_grad_enabled(not other):
        try:
            for device in before:
                torch.set_autocast_enabled(device, other)
            yield
        finally:
            torch.clear_autocast_cache()
            for device, enabled in before.items():
                torch.set_autocast_enabled(device, enabled)


def _random_states(modules: Iterable[nn.Module]) -> list[bytes]:
    """The states of the global random generators and of those that the modules hold."""
    generators: list[Any] = [np.random.get_state(), random.getstate()]
    on_devices = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        on_devices += torch.cuda.get_rng_state_all()
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, random.Random):
            generators.append(value.getstate())
        elif isinstance(value, np.random.RandomState):
            generators.append(value.get_state())
        elif isinstance(value, np.random.Generator):
            generators.append(value.bit_generator.state)
        elif isinstance(value, torch.Generator):
            on_devices.append(value.get_state())
    states = [pickle.dumps(state) for state in generators]
    return states + [state.cpu().numpy().tobytes() for state in on_devices]


def _restore(attributes: Mapping[nn.Module, dict[str, Any]], backbone: nn.Module) -> list[str]:
    """Gives modules their attributes back and returns the names of those that the forward set.
    torch.fx stores constants in new attributes of the backbone."""
    changed = []
    for module, before in attributes.items():
        now = vars(module)
        for name in list(now):
            is_new, is_proxy = name not in before, isinstance(now[name], fx.Proxy)
            if is_proxy or not (is_new or now[name] is before[name]):
                changed.append(f"{type(module).__name__}.{name}")
            if is_new and (is_proxy or module is backbone):
                del now[name]
        now.update(before)
    return changed


def _read_attribute(backbone: nn.Module, node: fx.Node, parts: dict[str, Any]) -> None:
    """Records the tensor that a get_attr node reads. If it is not in `state_dict`, a module that
    returns it replaces the node, because GraphModule would add the tensor to `state_dict`."""
    assert isinstance(node.target, str)
    owner_name, _, field = node.target.rpartition(".")
    owner = backbone.get_submodule(owner_name)
    value = getattr(owner, field)
    saved = field in owner._parameters or (
        field in owner._buffers and field not in owner._non_persistent_buffers_set
    )
    if isinstance(value, Tensor) and not saved:
        node.op, node.target = "call_module", "_constant_" + node.target.replace(".", "_")
        value = _Constant(value)
    parts[node.target] = value


def _cut(backbone: nn.Module, name: str, outputs: list[Any]) -> fx.Node:
    module = backbone.get_submodule(name)
    if len(outputs) != 1:
        got = f"{len(outputs)} calls" if outputs else "none"
        children = [f"{name}.{child}" for child, _ in module.named_children()]
        hint = f"; it holds {', '.join(children[:4])}" if children and not outputs else ""
        raise ValueError(
            f'exits: expected modules that the forward calls once, got {got} of "{name}" '
            f"({type(module).__name__}){hint}"
        )
    if not isinstance(outputs[0], fx.Proxy):
        raise ValueError(
            f'exits: expected "{name}" to return one tensor, got {type(outputs[0]).__name__}'
        )
    return outputs[0].node


class _Different(Exception):
    """The traces of training and evaluation differ in more than numbers."""


def _follow_mode(training: _Trace, evaluation: _Trace) -> _Trace:
    """One trace for both modes. Tracing stores `self.training`, and values derived from it, as
    plain numbers in the graph. A number that differs between the traces becomes a `_ByMode`."""
    graph = training.graph
    parts = dict(training.parts)
    ours, theirs = list(graph.nodes), list(evaluation.graph.nodes)
    index = {node: i for nodes in (ours, theirs) for i, node in enumerate(nodes)}

    def choose(node: fx.Node, a: Any, b: Any) -> fx.Node:
        name = f"_by_mode_{len(parts)}"
        parts[name] = _ByMode(a, b)
        with graph.inserting_before(node):
            return graph.call_module(name)

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

    for a, b in zip(ours, theirs, strict=False):
        try:
            if (a.op, a.target) != (b.op, b.target) or not _same_constant(a, training, evaluation):
                raise _Different
            a.args, a.kwargs = merge(a, a.args, b.args), merge(a, a.kwargs, b.kwargs)
        except _Different:
            raise ValueError(
                "backbone: expected a forward that runs the same operations in training and in "
                f"evaluation around the named modules, got {_spell(a)} in training and {_spell(b)} "
                f"in evaluation; {BY_HAND}"
            ) from None
    # Only the last node of a graph is its output. So if the nodes compared above are equal, up to
    # the end of the shorter graph, neither graph is longer.
    return _Trace(graph, training.cuts, parts)


def _same_constant(node: fx.Node, training: _Trace, evaluation: _Trace) -> bool:
    if node.op not in ("get_attr", "call_module"):
        return True
    a, b = training.parts[str(node.target)], evaluation.parts[str(node.target)]
    return a is b or (
        isinstance(a, _Constant) and isinstance(b, _Constant) and torch.equal(a.value, b.value)
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


def _check_order(trace: _Trace, exits: Sequence[str]) -> None:
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


def _stage_of(trace: _Trace) -> Callable[[fx.Node], int]:
    """A function from a node to the stage that it runs in. A cut is the last node of its stage."""
    position = {node: i for i, node in enumerate(trace.graph.nodes)}
    at = [position[cut] for cut in trace.cuts]
    return lambda node: bisect_left(at, position[node])


def _movable(trace: _Trace) -> set[fx.Node]:
    """Nodes that read only parameters, buffers and numbers; any stage that needs one repeats it."""
    movable: set[fx.Node] = set()
    for node in trace.graph.nodes:
        helper = node.op == "call_module" and isinstance(
            trace.parts[node.target], (_ByMode, _Constant)
        )
        pure = node.op in ("call_function", "call_method") and movable.issuperset(
            node.all_input_nodes
        )
        if node.op == "get_attr" or helper or pure:
            movable.add(node)
    return movable


def _check_cuts(trace: _Trace, exits: Sequence[str]) -> None:
    """Only the exit's output may cross the cut after it. Samples leave the batch there, so another
    tensor would have too many rows, and an integer such as the batch size would be wrong."""
    stage_of = _stage_of(trace)
    movable = _movable(trace)
    for e, (name, cut) in enumerate(zip(exits, trace.cuts, strict=True)):
        crossing = []
        for node in trace.graph.nodes:
            readers = [user for user in node.users if stage_of(user) > e]
            if node is not cut and node not in movable and stage_of(node) <= e and readers:
                crossing.append(f"{_spell(node)} (read by {_spell(readers[0])})")
        if crossing:
            raise ValueError(
                f'exits: expected that only the output of "{name}" crosses the cut after it, '
                f"got also {', '.join(crossing)}"
            )


def _spell(node: fx.Node) -> str:
    """A node as the source of the forward would write it, for messages."""
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the return"
    if node.op == "call_method":
        return f".{node.target}()"
    if node.target is getattr and isinstance(node.args[0], fx.Node):
        return f"{_spell(node.args[0])}.{node.args[1]}"
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{_spell(node.args[0])}[{node.args[1]}]"
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.target)}()"
    return f'"{node.target}"'


def _stage(trace: _Trace, e: int, kind: str) -> fx.GraphModule:
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
    _spell_targets(graph)
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


def _spell_targets(graph: fx.Graph) -> None:
    """Makes the code that torch.fx generates read modules whose names are no identifiers. For a
    module called `class` it would write `self.class`, and for one called `self` it would assign to
    `self`."""
    respelt = {}
    for node in graph.nodes:
        if node.name == "self":
            node._rename("self_")
        if node.op in ("call_module", "get_attr"):
            by_fx = by_us = "self"
            for atom in str(node.target).split("."):
                name = json.dumps(atom, ensure_ascii=False)
                is_word = atom.isidentifier()
                by_fx = f"{by_fx}.{atom}" if is_word else f'getattr({by_fx}, "{atom}")'
                # The compiler normalises identifiers outside ASCII, setattr does not.
                is_plain = is_word and atom.isascii() and not keyword.iskeyword(atom)
                by_us = f"{by_us}.{atom}" if is_plain else f"getattr({by_us}, {name})"
            if by_fx != by_us:
                respelt[by_fx] = by_us
    if respelt:
        graph.on_generate_code(lambda _: functools.partial(_respell, respelt))


def _respell(respelt: Mapping[str, str], lines: list[str]) -> list[str]:
    for by_fx, by_us in respelt.items():
        whole = re.compile(rf"(?<![\w.]){re.escape(by_fx)}(?![\w.])")
        lines = [whole.sub(by_us.replace("\\", r"\\"), line) for line in lines]
    return lines


def work_on_copy(stage: nn.Module) -> None:
    assert isinstance(stage, fx.GraphModule)
    features = next(iter(stage.graph.nodes))
    readers = list(features.users)
    with stage.graph.inserting_after(features):
        own = stage.graph.call_method("clone", (features,))
    for reader in readers:
        reader.replace_input_with(features, own)
    stage.recompile()
