"""Early exits on any network: `from_backbone` cuts it at the outputs of named modules.

torch.fx traces only the modules that contain the named ones (their ancestors); every other module
is called as it is. Control flow inside a block (stochastic depth, attention) is therefore
untouched and still follows `train()` and `eval()`. The trace is cut into stages, each a
`torch.fx.GraphModule` that shares the backbone's submodules and parameters under their own names.

Shapes: N samples, C classes, D channels, E exits (exit E is the network's own classifier).
"""

from __future__ import annotations

import difflib
import math
import operator
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from . import checks
from .modes import mode
from .modules import ELF, ExitHead

__all__ = ["from_backbone", "split"]

_BY_HAND = "build elf_fast.ELF from stages and heads by hand"


def from_backbone(
    backbone: nn.Module,
    exits: Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor,
    conv: bool = False,
    **elf_options: Any,
) -> ELF:
    """An `ELF` of a network, with an `ExitHead` at the output of each named module.

    The last stage returns the network's own logits, so its head is `nn.Identity`. Parameters and
    buffers are shared with the backbone, not copied; those that its forward never uses are in no
    stage. The backbone's `training` flags do not change. `elf_fast.unfuse` gives the plain PyTorch
    module.

    Args:
        backbone: maps a batch [N, ...] to logits [N, C]; further arguments of its forward take
            their defaults.
        exits: names of submodules, as `backbone.named_modules()` spells them, in the order in which
            they run. Only the output of the named module may cross the cut after it.
        num_classes: C.
        example_input: a batch [N, ...] on the backbone's device. It is run in evaluation mode, to
            find shapes and to compare the stages with the backbone. Its values do not matter.
        conv: `ExitHead(conv=True)`; features [N, D, H, W] only.
        elf_options: keyword arguments of `ELF`: thresholds, criterion, exit_loss, drop_exited, ...

    Shape: features at an exit are vectors [N, D], tokens [N, T, D] or maps [N, D, H, W]. Maps
    [N, H, W, D] (Swin) are recognised by the aspect ratio of `example_input`
    [N, channels, height, width], and are averaged over H and W, too.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown, repeated, out of order, or not called exactly once; more than
            one value crosses a cut; the forward cannot be traced, or differs between training and
            evaluation in more than numbers; features or logits have another shape than expected.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> model = from_backbone(net, ["1"], 10, example_input=x, thresholds=0.5)
        >>> model.eval()(x).logits.shape
        torch.Size([4, 10])
    """
    _check_example(example_input, num_classes)
    stages = split(backbone, exits)
    _, *features, logits = _run(backbone, stages, exits, example_input)
    if logits.dim() != 2 or logits.shape[0] != len(example_input):
        raise ValueError(
            f"backbone: expected logits of shape [{len(example_input)}, C], "
            f"got {checks.describe(logits)}"
        )
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"num_classes: expected {logits.shape[1]}, the classes of the backbone's logits, "
            f"got {num_classes}"
        )
    heads: list[nn.Module] = [
        _head(name, value, example_input, num_classes, conv)
        for name, value in zip(exits, features, strict=True)
    ]
    model = ELF(stages, [*heads, nn.Identity()], **elf_options)
    theirs = set(backbone.modules())
    for module in model.modules():
        if module not in theirs:
            module.training = backbone.training
    return model


def split(backbone: nn.Module, exits: Sequence[str]) -> list[nn.Module]:
    """The len(exits) + 1 stages of a network, cut after each named module. Run one after the other
    they compute what the network computes. Use it to build an `ELF` with heads of your own.

    Arguments, sharing and errors are those of `from_backbone`, without its checks on an example. A
    module that runs on both sides of a cut is in both stages. If the backbone has an in-place
    module right after a cut (`nn.ReLU(inplace=True)`), the stage overwrites its input;
    `from_backbone` makes it work on a copy instead.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> first, second = split(net, ["1"])
        >>> second.get_parameter("2.weight") is net[2].weight
        True
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected an nn.Module, got {checks.describe(backbone)}")
    exits = _check_names(backbone, exits)
    with mode(backbone, training=True):
        trace = _trace(backbone, exits)
    with mode(backbone, training=False):
        trace = _follow_mode(trace, _trace(backbone, exits))
    _drop_unused_sizes(trace.graph)
    _check_order(trace, exits)
    _check_cuts(trace, exits)
    return [_stage(trace, e, type(backbone).__name__) for e in range(len(exits) + 1)]


def _check_names(backbone: nn.Module, exits: Any) -> list[str]:
    if isinstance(exits, str) or not isinstance(exits, Sequence):
        raise TypeError(f"exits: expected a list of module names, got {checks.describe(exits)}")
    if not exits:
        raise ValueError("exits: expected at least one module name, got none")
    names = [name for name, _ in backbone.named_modules(remove_duplicate=False) if name]
    kind = type(backbone).__name__
    seen: dict[nn.Module, str] = {}
    for name in exits:
        if not isinstance(name, str):
            raise TypeError(f"exits: expected module names, got {checks.describe(name)}")
        if name not in names:
            near = difflib.get_close_matches(name, names)
            if near:
                hint = f"near names: {', '.join(near)}"
            else:
                hint = f"its children: {', '.join(dict(backbone.named_children())) or 'none'}"
            raise ValueError(f'exits: no module named "{name}" in {kind}; {hint}')
        module = backbone.get_submodule(name)
        if module in seen:
            raise ValueError(
                f'exits: expected different modules, got "{seen[module]}" and "{name}", '
                "which are the same"
            )
        seen[module] = name
    return list(exits)


class _Tracer(fx.Tracer):
    """Traces into the ancestors of the exits only, and records the values that the exits return.
    The arguments have defaults because unpickling a stage traces it again, with a tracer that is
    made without arguments."""

    proxy_buffer_attributes = True

    def __init__(self, backbone: nn.Module | None = None, exits: Sequence[str] = ()) -> None:
        super().__init__()
        self.exits: dict[nn.Module, str] = {}
        self.ancestors: set[nn.Module] = set()
        self.outputs: dict[str, list[Any]] = {name: [] for name in exits}
        for name in exits if backbone is not None else ():
            assert backbone is not None
            self.exits[backbone.get_submodule(name)] = name
            atoms = name.split(".")
            for depth in range(1, len(atoms)):
                self.ancestors.add(backbone.get_submodule(".".join(atoms[:depth])))

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
        value = super().call_module(m, forward, args, kwargs)
        if m in self.exits:
            self.outputs[self.exits[m]].append(value)
        return value


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


def _trace(backbone: nn.Module, exits: Sequence[str]) -> _Trace:
    tracer = _Tracer(backbone, exits)
    own_attributes = set(backbone.__dict__)
    parts: dict[str, Any] = {}
    try:
        graph = tracer.trace(backbone)
        for node in graph.nodes:
            if node.op == "call_module":
                parts[node.target] = backbone.get_submodule(node.target)
            elif node.op == "get_attr":
                _read_attribute(backbone, node, parts)
    except Exception as error:  # a forward that is given proxies can raise anything
        raise ValueError(
            "backbone: expected a forward(x) that torch.fx can trace around the named modules, "
            f"without decisions on the data or its shape; {type(backbone).__name__} raised "
            f"{type(error).__name__}: {textwrap.shorten(str(error), 120)}; {_BY_HAND}"
        ) from error
    finally:
        for name in set(backbone.__dict__) - own_attributes:  # constants that the tracer stored
            delattr(backbone, name)
    return _Trace(graph, [_cut(backbone, name, tracer.outputs[name]) for name in exits], parts)


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
                f"in evaluation; {_BY_HAND}"
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
    graph = fx.Graph(tracer_cls=_Tracer)
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
    return fx.GraphModule(trace.parts, graph, class_name=f"{kind}Stage{e}")


def _check_example(example_input: Any, num_classes: Any) -> None:
    checks.tensor("example_input", example_input)
    if example_input.dim() < 1 or len(example_input) < 1:
        raise ValueError(
            "example_input: expected a batch [N, ...] with N >= 1, "
            f"got {checks.describe(example_input)}"
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")


def _run(
    backbone: nn.Module, stages: list[nn.Module], exits: Sequence[str], x: Tensor
) -> list[Tensor]:
    """[x, output of the first stage, ..., logits], in evaluation mode. Raises ValueError if the
    logits differ from the backbone's. A stage that writes into its input is changed to work on a
    copy, because the head before it may need these features for its gradient."""
    chain = nn.ModuleList([backbone, *stages])
    # The heads take the dtype of these features as their own, and autocast would change it.
    outside_autocast = torch.autocast(x.device.type, enabled=False)
    with mode(chain, training=False), torch.no_grad(), outside_autocast:
        try:
            expected = backbone(x.clone())
        except Exception as error:
            raise ValueError(
                f"example_input: expected a batch that the backbone takes, got "
                f"{checks.describe(x)}: {type(error).__name__}: {error}"
            ) from error
        values = [x.clone()]
        for e, stage in enumerate(stages):
            version = values[-1]._version
            value = stage(values[-1])
            if e > 0 and values[-1]._version != version:
                _work_on_copy(stage)
            if not isinstance(value, Tensor):
                what = (
                    f'exits: expected "{exits[e]}"' if e < len(exits) else "backbone: expected it"
                )
                raise ValueError(f"{what} to return one tensor, got {type(value).__name__}")
            values.append(value)
    logits = values[-1]
    largest = expected.float().abs().nan_to_num(0, 0, 0).amax().item() if expected.numel() else 0
    if logits.shape != expected.shape or not torch.allclose(
        logits.float(), expected.float(), rtol=1e-2, atol=1e-2 * largest, equal_nan=True
    ):
        raise ValueError(
            "backbone: expected its stages to compute its logits on example_input; they differ: "
            "a hook, a random number or a state outside the named modules is lost in tracing; "
            + _BY_HAND
        )
    return values


def _work_on_copy(stage: nn.Module) -> None:
    assert isinstance(stage, fx.GraphModule)
    features = next(iter(stage.graph.nodes))
    readers = list(features.users)
    with stage.graph.inserting_after(features):
        own = stage.graph.call_method("clone", (features,))
    for reader in readers:
        reader.replace_input_with(features, own)
    stage.recompile()


def _head(name: str, features: Tensor, x: Tensor, num_classes: int, conv: bool) -> ExitHead:
    shape = features.shape
    if (
        not features.is_floating_point()
        or len(shape) not in (2, 3, 4)
        or shape[0] != len(x)
        or 0 in shape
    ):
        raise ValueError(
            f'exits: expected "{name}" to return features [N, D], [N, T, D] or [N, D, H, W] with '
            f"N = {len(x)}, got {checks.describe(features)}"
        )
    channels_at_end = len(shape) == 3 or _is_nhwc(shape, x.shape)
    if conv and (len(shape) != 4 or channels_at_end):
        layout = " (read as [N, H, W, D])" if len(shape) == 4 else ""
        raise ValueError(
            f'conv: expected features [N, D, H, W], got {list(shape)}{layout} from "{name}"'
        )
    head = ExitHead(shape[-1 if channels_at_end else 1], num_classes, conv=conv)
    if channels_at_end and len(shape) == 4:
        head.stem = nn.Flatten(1, 2)  # [N, H, W, D] as tokens: the head then averages over H and W
    return head.to(features.device, features.dtype)


def _is_nhwc(shape: torch.Size, input_shape: torch.Size) -> bool:
    """Whether features [N, a, b, c] are [N, H, W, D]: a / b equals the input's height / width, up
    to the rounding of strides, and b / c does not."""
    if len(shape) != 4 or len(input_shape) != 4:
        return False
    height, width = input_shape[2:]

    def fits(h: int, w: int) -> bool:
        return abs(math.log(h * width / (w * height))) <= math.log(1 + 1 / min(h, w)) + 1e-9

    return fits(shape[1], shape[2]) and not fits(shape[2], shape[3])
