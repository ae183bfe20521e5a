"""The settings of a training run: one table for the command line, YAML files and code.

A field of `TrainConfig` is a flag (`batch_size` is `--batch-size`) and a key of the YAML file. Its
annotation says what values it takes, its `_option` the help text and its place in `--help`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .. import checks


def _option(default: Any, group: str, help: str, **metadata: Any) -> Any:
    """A setting. metadata: its metavar in the help, its limits (lowest,) or (lowest, highest), the
    value that the bare flag stands for (const)."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. Equal settings give equal weights, on one kind of machine.

    Raises:
        ValueError, TypeError: naming the setting, what was expected and what came.
    """

    dataset: Literal[
        "folder", "lists", "digits", "cifar10", "cifar100",
        "ImageNet-LT", "Places-LT", "iNaturalist-2018",
    ] = _option("folder", "data", "what to train on: see docs/data.md")  # fmt: skip
    data_dir: str | None = _option(None, "data", "folder of the images", metavar="FOLDER")
    lists: str | None = _option(
        None, "data", "folder of the split lists of a published set, or of train.txt, val.txt and "
        "test.txt for `lists`; data-dir if not given", metavar="FOLDER",
    )  # fmt: skip
    imbalance: float | None = _option(
        None,
        "data",
        "make training long-tailed: the largest class over the smallest",
        limits=(1.0,),
    )
    imbalance_profile: Literal["exponential", "step"] = _option(
        "exponential", "data", "how class sizes fall from head to tail"
    )
    validation_fraction: float = _option(
        0.0,
        "data",
        "share of every class held out of training, to choose thresholds on",
        limits=(0.0, 1.0),
    )
    data_seed: int = _option(
        0,
        "data",
        "of the choice of images for the tail and for validation; published CIFAR-LT: 0",
        limits=(0,),
    )
    img_size: int | None = _option(
        None,
        "data",
        "height and width; 224 if not given, and 32 or 16 for CIFAR and digits",
        limits=(1,),
    )
    transforms: Literal["small", "large"] | None = _option(
        None, "data", "small: shift and mirror images that have img-size already; large: random "
        "crops of images of any size; by data set if not given",
    )  # fmt: skip
    skip_errors: bool = _option(False, "data", "leave out images that cannot be read")

    model: str = _option("resnet50", "model", "of timm or torchvision, or cifar_resnet32")
    model_kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={"group": "model", "help": "options of the network, such as drop_path_rate=0.1"},
    )

    exits: tuple[str, ...] | None = _option(
        None, "exits", "modules after which to put exits; after the first three quarters of the "
        "network's stages if not given",
    )  # fmt: skip
    conv_heads: bool = _option(False, "exits", "a convolution in every head but the last")
    criterion: Literal["confidence", "margin", "entropy"] = _option(
        "confidence",
        "exits",
        "what the exit test reads; an entropy, in [0, 1], must be small to leave, so give it "
        "--thresholds of its own, such as 0.3",
    )
    thresholds: tuple[float, ...] = _option(
        (0.9,), "exits", "of the exit test, one or one per exit; of inference until calibrated"
    )
    train_threshold: tuple[float, ...] | None = _option(
        None, "exits", "the same in training; those of inference if not given"
    )
    exit_weights: tuple[float, ...] = _option(
        (1.0,), "exits", "of the losses: one, or one per exit with the last"
    )
    drop_exited: bool | None = _option(
        None, "exits", "in training, drop samples that left from the later stages, or keep them "
        "there with weight 0; keep if not given where these normalise by the batch, else drop",
    )  # fmt: skip
    calibrate: bool = _option(
        True, "exits", "after training, choose the threshold that is most accurate on validation, "
        "and cheapest among equals",
    )  # fmt: skip
    max_flops: float | None = _option(
        None, "exits", "share of the FLOPs of the network without exits that a threshold so chosen "
        "may cost", limits=(0.0,),
    )  # fmt: skip

    loss: Literal[
        "cross_entropy", "focal", "class_balanced", "ldam", "balanced_softmax", "logit_adjusted"
    ] = _option("cross_entropy", "loss and sampling", "at every exit; ldam brings its classifier")
    label_smoothing: float = _option(0.0, "loss and sampling", "in [0, 1]")
    gamma: float = _option(2.0, "loss and sampling", "of focal")
    beta: float = _option(0.9999, "loss and sampling", "of class_balanced and --drw-epoch")
    tau: float = _option(1.0, "loss and sampling", "of logit_adjusted")
    ldam_scale: float = _option(30.0, "loss and sampling", "of ldam")
    drw_epoch: int | None = _option(
        None,
        "loss and sampling",
        "re-weight the loss by class from this epoch on, counted from 0",
        limits=(0,),
    )
    sampler: Literal["instance", "class_balanced", "square_root", "progressive"] = _option(
        "instance", "loss and sampling", "how often an epoch shows each class"
    )

    epochs: int = _option(200, "optimisation", "passes over the training data", limits=(1,))
    batch_size: int = _option(128, "optimisation", "per process", limits=(1,))
    grad_accum_steps: int = _option(
        1, "optimisation", "batches per step of the optimiser", limits=(1,)
    )
    opt: str = _option("sgd", "optimisation", "optimiser, as timm names them: sgd, adamw, ...")
    lr: float = _option(0.1, "optimisation", "learning rate after the warm-up", limits=(0.0,))
    momentum: float = _option(0.9, "optimisation", "of sgd", limits=(0.0, 1.0))
    weight_decay: float = _option(
        2e-4, "optimisation", "not on biases and normalisation", limits=(0.0,)
    )
    sched: Literal["cosine", "step"] = _option("cosine", "optimisation", "of the learning rate")
    warmup_epochs: float = _option(
        5.0, "optimisation", "in which the learning rate rises", limits=(0.0,)
    )
    min_lr: float = _option(0.0, "optimisation", "where cosine ends", limits=(0.0,))
    decay_milestones: tuple[int, ...] = _option(
        (160, 180), "optimisation", "epochs at which step multiplies the rate by --decay-rate"
    )
    decay_rate: float = _option(0.01, "optimisation", "of step", limits=(0.0, 1.0))
    clip_grad: float | None = _option(
        None, "optimisation", "largest norm of the gradient", limits=(0.0,)
    )
    model_ema: bool = _option(
        False, "optimisation", "average the weights over steps; the average is the result"
    )
    model_ema_decay: float = _option(
        0.9998, "optimisation", "of the average, per step", limits=(0.0, 1.0)
    )

    device: str | None = _option(None, "speed", "cuda if there is one, else cpu")
    workers: int = _option(
        4, "speed", "processes that load images, per training process", limits=(0,)
    )
    amp: bool = _option(False, "speed", "mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = _option("bfloat16", "speed", "of mixed precision")
    channels_last: bool = _option(False, "speed", "memory format of images and network")
    torchcompile: str | None = _option(
        None, "speed", "compile every stage, by inductor or the backend named",
        metavar="BACKEND", const="inductor",
    )  # fmt: skip
    sync_bn: bool = _option(False, "speed", "batch statistics over all processes (GPU only)")

    output: str = _option(
        "run", "run", "folder for checkpoints, weights and results", metavar="FOLDER"
    )
    seed: int = _option(0, "run", "of weights, order and augmentation", limits=(0,))
    val_interval: int = _option(1, "run", "epochs from one validation to the next", limits=(1,))
    checkpoint_epochs: int = _option(
        1, "run", "epochs from one checkpoint to the next", limits=(1,)
    )
    checkpoint_steps: int | None = _option(
        None, "run", "steps between more checkpoints", limits=(1,)
    )
    log_tensorboard: bool = _option(True, "run", "write TensorBoard's files into the folder")
    log_wandb: bool = _option(False, "run", "log to Weights & Biases")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, limits = getattr(self, option.name), option.metadata.get("limits")
            if limits and value is not None:
                check: Any = checks.integer if isinstance(limits[0], int) else checks.at_least
                check(option.name, value, *limits)
        if self.dataset != "digits" and self.data_dir is None:
            raise ValueError(
                f"data_dir: expected a folder of images (dataset {self.dataset}), got none"
            )
        if self.imbalance is not None and self.dataset not in _SUBSETTABLE:
            raise ValueError(
                f"imbalance: expected none for {self.dataset}, whose lists say what is in it, "
                f"got {self.imbalance}"
            )
        if self.max_flops is not None and not self.calibrate:
            raise ValueError(
                "max_flops: expected none without calibration, which chooses the threshold, got "
                f"{self.max_flops}"
            )
        if self.drw_epoch is not None and self.drw_epoch >= self.epochs:
            raise ValueError(
                f"drw_epoch: expected an epoch below epochs = {self.epochs}, got {self.drw_epoch}"
            )

    @property
    def has_exits(self) -> bool:
        """`--no-exits` is an empty list of exits."""
        return self.exits != ()


_HINTS = get_type_hints(TrainConfig)
_SUBSETTABLE = ("folder", "digits", "cifar10", "cifar100")
#: Flags for true and false that are not --name and --no-name.
_SWITCHES = {"drop_exited": ("--drop-exited", "--keep-exited")}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The settings from keys and plain values, as YAML and the command line give them; numbers may
    be strings.

    Raises:
        ValueError, TypeError: an unknown key, or a value that does not fit.
    """
    for name in values:
        if name not in _HINTS:
            near = difflib.get_close_matches(str(name), _HINTS)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise ValueError(f"{name}: expected a setting of elf-fast train, got none{hint}")
    return TrainConfig(**{k: _convert(k, v, _HINTS[k]) for k, v in values.items()})


def load_yaml(path: Path) -> dict[str, Any]:
    """The settings that a YAML file names.

    Raises:
        ValueError: it is no YAML, or not a table of keys and values.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {checks.describe(values)}")
    return values


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """All settings as plain values, which YAML and strict JSON hold; `from_dict` reads them."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def to_yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting. What was not given is not in the namespace."""
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(TrainConfig):
        title = option.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], option, _without_none(_HINTS[option.name]))
    groups["exits"].add_argument(
        "--no-exits", dest="exits", action="store_const", const=(), default=argparse.SUPPRESS,
        help="train the network without exits, all else equal",
    )  # fmt: skip


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(arguments).items() if name in _HINTS}


def _add_flag(group: Any, option: dataclasses.Field, hint: Any) -> None:
    flag = "--" + option.name.replace("_", "-")
    common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    text = option.metadata["help"].replace("%", "%%")
    if hint is bool:
        yes, no = _SWITCHES.get(option.name, (flag, "--no-" + flag[2:]))
        if option.default is not None:
            text += f" (default: {yes if option.default else no})"
        group.add_argument(yes, no, action=_Switch, nargs=0, help=text, **common)
        return
    shown = _spell(option.default)
    text += f" (default: {shown})" if shown else ""
    origin = get_origin(hint)
    if origin is Literal:
        group.add_argument(flag, choices=get_args(hint), help=text, **common)
    elif origin in (tuple, dict):
        metavar = "KEY=VALUE" if origin is dict else _METAVAR[get_args(hint)[0]]
        group.add_argument(flag, nargs="+", metavar=metavar, help=text, **common)
    else:
        common["metavar"] = option.metadata.get("metavar", _METAVAR[hint])
        if "const" in option.metadata:
            common |= {"nargs": "?", "const": option.metadata["const"]}
        group.add_argument(flag, help=text, **common)


class _Switch(argparse.Action):
    """Two flags, the first for true and the second for false."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


_METAVAR = {int: "N", float: "X", str: "NAME"}


def _spell(default: Any) -> str:
    if default is None or default is dataclasses.MISSING:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
    return hint


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` asks for it."""
    inner = _without_none(hint)
    if value is None and inner is not hint:
        return None
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{name}: expected one of {', '.join(arguments)}, got {value!r}")
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, item, arguments[0]) for item in items)
    if origin is dict:
        items = value if isinstance(value, (list, tuple)) else [value]
        return value if isinstance(value, dict) else dict(_key_value(name, i) for i in items)
    is_bool = isinstance(value, bool)
    if isinstance(value, inner) and is_bool == (inner is bool):
        return value
    if (inner is float and isinstance(value, int) and not is_bool) or (
        inner in (int, float) and isinstance(value, str)
    ):
        with contextlib.suppress(ValueError):
            return inner(value)
    expected = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[inner]
    raise TypeError(f"{name}: expected {expected}, got {checks.describe(value)}")


def _key_value(name: str, item: Any) -> tuple[str, Any]:
    import yaml

    key, equals, value = str(item).partition("=")
    if not equals:
        raise ValueError(f"{name}: expected KEY=VALUE, got {item!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: expected KEY=VALUE with a YAML value, got {item!r}") from error
