"""The layers that make a network's logits: those that run last, wherever they are defined."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .heads import ExitHead
from .modes import mode
from .tracing import Tracer

__all__ = ["LastLayers", "find"]


class LastLayers(NamedTuple):
    layers: dict[str, Any]  # by name
    #: Logits from the layers' outputs, by name. None if the forward cannot be recorded.
    logits: Callable[[Mapping[str, Tensor]], Tensor] | None
    #: Whether the logits also depend on other values.
    depends_on_more: bool = False


def find(module: nn.Module, kinds: tuple[type[nn.Module], ...], name: str = "") -> LastLayers:
    """The layers of these kinds whose outputs reach the output of `module` through no other of
    them. `name` is put in front of their names.

    If torch.fx cannot record a forward, the `classifier` of an `ExitHead` stands for it, and for
    another module the layer that is defined last, with all others that have as many outputs.
    """
    if isinstance(module, kinds):
        return LastLayers({name: module}, lambda outputs: outputs[name])
    is_head = type(module).forward is ExitHead.forward
    inner = "classifier" if is_head else "_orig_mod"  # of torch.compile
    if is_head or inner in dict(module.named_children()):
        return find(module.get_submodule(inner), kinds, _join(name, inner))
    try:
        graph = _graph(module)
    except Exception:  # a forward that is given proxies can raise anything
        if isinstance(module, ExitHead):
            found = find(module.classifier, kinds, _join(name, "classifier"))
            return found._replace(logits=None)
        return LastLayers(_defined_last(module, kinds, name), None)
    return _follow(module, graph, kinds, name)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}".lstrip(".")


def _defined_last(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], name: str
) -> dict[str, Any]:
    named = {n: m for n, m in module.named_modules(prefix=name) if isinstance(m, kinds)}
    C = getattr([*named.values()][-1], "out_features", None)
    return {n: layer for n, layer in named.items() if getattr(layer, "out_features", None) == C}


def _graph(module: nn.Module) -> fx.Graph:
    """What the module's own forward does in evaluation mode, from its input to its output."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    before = dict(vars(module))
    try:
        with mode(module, training=False):
            graph = Tracer().trace(module)
    finally:
        for name in set(vars(module)) - set(before):  # constants that torch.fx stored
            delattr(module, name)
        vars(module).update(before)
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise TypeError("expected one tensor")
    return graph


def _follow(
    module: nn.Module, graph: fx.Graph, kinds: tuple[type[nn.Module], ...], name: str
) -> LastLayers:
    """Follows the graph back from its output to the first modules that hold such layers."""
    output = graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    found: dict[fx.Node, LastLayers] = {}
    to_visit, seen, more = [output], {output}, False
    while to_visit:
        node = to_visit.pop()
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if any(isinstance(m, kinds) for m in child.modules()):
                found[node] = find(child, kinds, _join(name, str(node.target)))
                continue
        more |= node.op == "placeholder"
        new = [] if _reads_size(node) else [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        to_visit += new
    in_order = [found[node] for node in graph.nodes if node in found]
    return LastLayers(
        {name: layer for last in in_order for name, layer in last.layers.items()},
        functools.partial(_logits, module, output, found),
        more or any(last.depends_on_more for last in in_order),
    )


def _reads_size(node: fx.Node) -> bool:
    is_shape = node.target is getattr and node.args[1] in ("shape", "device", "dtype")
    return is_shape or (node.op == "call_method" and node.target in ("size", "dim"))


@torch.no_grad()
def _logits(
    module: nn.Module,
    output: fx.Node,
    found: Mapping[fx.Node, LastLayers],
    outputs: Mapping[str, Tensor],
) -> Tensor:
    """Computes the output node from the layers' outputs."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            values[node] = compute(node)
        return values[node]

    def compute(node: fx.Node) -> Any:
        if node in found:
            inner = found[node].logits
            if inner is None:
                raise ValueError(f"{node.target}: expected a forward that torch.fx can record")
            return inner(outputs)
        if node.op == "placeholder":
            raise ValueError(f"{node.name}: expected logits that do not need the input")
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(module)
        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        called = node.target if callable(node.target) else module.get_submodule(str(node.target))
        return called(*args, **kwargs)

    with mode(module, training=False):
        return value(output)
