"""Records the forward of a network with torch.fx, opened down to the modules that hold exits.

Only the modules that contain a named one (their ancestors) are opened; every other module is called
as it is. A record keeps what the Python code did to the input in one run, so `record` refuses what
a graph cannot hold: contexts such as `torch.no_grad()`, hooks, random decisions, attributes.
It finds the generators that modules hold; `stages.cut` compares records, which shows others.
"""

from __future__ import annotations

import collections
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = [
    "BY_HAND",
    "Constant",
    "Trace",
    "Tracer",
    "check_calls",
    "record",
    "spell",
    "spell_targets",
]

#: The end of a message about a network that cannot be cut.
BY_HAND = "build elf_fast.ELF from stages and heads by hand"


def _ancestors(backbone: nn.Module, exits: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that contain an exit and that tracing opens, by name; "" is the backbone."""
    found = {"": backbone}
    for name in exits:
        atoms = name.split(".")
        for depth in range(1, len(atoms)):
            path = ".".join(atoms[:depth])
            found[path] = backbone.get_submodule(path)
    return found


def check_calls(backbone: nn.Module, exits: Sequence[str]) -> None:
    """The modules that tracing opens are not called in the stages; their operations are. So their
    hooks and their own `train()` would not run, and torch.fx reads the backbone's forward from its
    class."""
    for name, module in _ancestors(backbone, exits).items():
        spelt = f'"{name}"' if name else type(module).__name__
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                      "_backward_pre_hooks"):  # fmt: skip
            if getattr(module, hooks):
                raise ValueError(
                    f"backbone: expected no hook on {spelt}, which contains an exit, because the "
                    f"stages do not call it, got {len(getattr(module, hooks))} in {hooks}; remove "
                    "it or register it on a module that contains no exit"
                )
        for method in ("train", "eval"):
            of_class = getattr(type(module), method)
            if method in vars(module) or of_class is not getattr(nn.Module, method):
                raise ValueError(
                    f"backbone: expected the {method}() of nn.Module on {spelt}, which contains an "
                    f"exit, because the stages do not call it, got {type(module).__name__}'s own; "
                    "move it into a module that contains no exit"
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
        spell_targets(graph)
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
                self.lost = f"{spell(node)} under gradient checkpointing"
            elif inside != self.outside:
                self.lost = f"{spell(node)} under {inside.spell(self.outside)}"
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


class Trace(NamedTuple):
    graph: fx.Graph
    cuts: list[fx.Node]  # one per exit: the value its module returns
    parts: dict[str, Any]  # target of a get_attr or call_module node -> tensor or module


class Constant(nn.Module):
    """A tensor that a forward reads and that is not in the backbone's `state_dict`."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


def record(backbone: nn.Module, exits: Sequence[str], *, other_contexts: bool = False) -> Trace:
    """What the forward does, in the network's current modes.

    It runs under gradients and without autocast; with `other_contexts` the other way round, which
    shows contexts that the former hides: torch.autocast(enabled=False), torch.enable_grad().

    `check_calls` comes first.

    Raises:
        ValueError: torch.fx cannot record the forward, would lose some of what it does, or an exit
            is not called exactly once or returns no tensor.
    """
    failure: Exception | None = None
    with _contexts(backbone, other=other_contexts):
        tracer = Tracer(backbone, exits)
        before = _random_states(tracer.ancestors)
        attributes = {module: _attributes(module) for module in tracer.ancestors}
        try:
            graph, parts = _parts_of(tracer, backbone)
        except Exception as error:  # a forward that is given proxies can raise anything
            failure = error
        changed = _restore(attributes, backbone)
        if changed:
            tracer.lost = f"an attribute that the forward sets or fills, {changed[0]}"
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
    return Trace(graph, [_cut(backbone, name, tracer.outputs[name]) for name in exits], parts)


def _parts_of(tracer: Tracer, backbone: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph, and what its nodes call and read, by target."""
    graph = tracer.trace(backbone)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            parts[node.target] = backbone.get_submodule(node.target)
        elif node.op == "get_attr":
            _read_attribute(backbone, node, parts)
            constant = parts[node.target]
            if isinstance(constant, Constant) and not constant.value.is_leaf:
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


def _attributes(module: nn.Module) -> dict[str, tuple[Any, list[Any]]]:
    """By name, the value of an attribute and what it holds."""
    return {name: (value, _items(value)) for name, value in vars(module).items()}


def _items(value: Any) -> list[Any]:
    """What a container holds, a dict its keys and then its values. Nothing for other objects."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, set, collections.deque)) else []


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(items) // 2
        for key, item in zip(items[:half], items[half:], strict=True):
            container[key] = item  # `update` of a Counter would count
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _restore(
    attributes: Mapping[nn.Module, dict[str, tuple[Any, list[Any]]]], backbone: nn.Module
) -> list[str]:
    """Gives modules their attributes back and returns the names of those that the forward set, or
    filled. torch.fx stores constants in new attributes of the backbone."""
    changed = []
    for module, before in attributes.items():
        now = vars(module)
        for name in list(now):
            is_new, is_proxy = name not in before, isinstance(now[name], fx.Proxy)
            if is_proxy or not (is_new or now[name] is before[name][0]):
                changed.append(f"{type(module).__name__}.{name}")
            if is_new and (is_proxy or module is backbone):
                del now[name]
        for name, (value, items) in before.items():
            if list(map(id, _items(value))) != list(map(id, items)):
                changed.append(f"{type(module).__name__}.{name}")
                _refill(value, items)
            now[name] = value
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
        value = Constant(value)
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


def spell(node: fx.Node) -> str:
    """A node as the source of the forward would write it, for messages."""
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the return"
    if node.op == "call_method":
        return f".{node.target}()"
    if node.target is getattr and isinstance(node.args[0], fx.Node):
        return f"{spell(node.args[0])}.{node.args[1]}"
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{spell(node.args[0])}[{node.args[1]}]"
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.target)}()"
    return f'"{node.target}"'


def spell_targets(graph: fx.Graph) -> None:
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
