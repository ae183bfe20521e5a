"""The settings of a training run: one table for the command line, YAML files and code.

A field of `TrainConfig` is a flag (`batch_size` is `--batch-size`) and a key of the YAML file. Its
annotation says what values it takes, its `_option` the help text and its group in `--help`. Only
`TrainConfig` converts and checks values, so all three ways give the same result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from .. import checks, criteria
from ..criteria import Score
from .values import convert

#: What one exit's entry in `thresholds` may be: a number, or one number per class.
Thresholds = float | tuple[float, ...]

#: The largest integer of settings without a limit of their own. Larger ones overflow further on.
LARGEST = 2**31 - 1


def _option(default: Any, group: str, help: str, **metadata: Any) -> Any:
    """A setting. metadata: metavar in the help; limits (lowest,) or (lowest, highest) of the number
    or of each; choices, the names it takes; const, its value if the flag is given without one."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. On one kind of machine, equal settings give equal weights.

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
        "seed that chooses images for the tail and for validation; published CIFAR-LT: 0",
        limits=(0, 2**32 - 1),  # as NumPy takes them
    )
    img_size: int | None = _option(
        None,
        "data",
        "height and width; 224 if not given, and 32 or 16 for CIFAR and digits",
        limits=(1, 2**14),
    )
    transforms: Literal["small", "large"] | None = _option(
        None, "data", "small: shift and mirror images that have img-size already; large: random "
        "crops of images of any size; by data set if not given",
    )  # fmt: skip
    mean: tuple[float, ...] | None = _option(
        None, "data", "mean of red, green and blue in [0, 1], which images are normalised with; "
        "those of the pretrained weights, CIFAR or ImageNet if not given", limits=(-1e6, 1e6),
    )  # fmt: skip
    std: tuple[float, ...] | None = _option(
        None, "data", "standard deviations, in the same way", limits=(1e-6, 1e6)
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = _option(
        None, "data", "how --transforms large scales images; as for the pretrained weights, else "
        "bilinear, if not given",
    )  # fmt: skip
    exif_orientation: bool = _option(
        True, "data", "turn photos as the orientation in their EXIF data says"
    )
    skip_errors: bool = _option(False, "data", "leave out images that cannot be read")

    hflip: float = _option(
        0.5, "augmentation", "probability of mirroring; 0 turns it off", limits=(0.0, 1.0)
    )
    scale: tuple[float, ...] = _option(
        (0.08, 1.0), "augmentation", "smallest and largest share of the area that a random crop of "
        "--transforms large keeps", limits=(0.0, 1.0),
    )  # fmt: skip
    auto_augment: Literal["autoaugment", "randaugment", "trivialaugment", "augmix"] | None = (
        _option(None, "augmentation", "a policy of torchvision, with its defaults")
    )
    reprob: float = _option(
        0.0, "augmentation", "probability of erasing a rectangle at random", limits=(0.0, 1.0)
    )
    mixup: float = _option(
        0.0, "augmentation", "alpha of mixup, which blends two images; 0 turns it off",
        limits=(0.0, 1e6),
    )  # fmt: skip
    cutmix: float = _option(
        0.0, "augmentation", "alpha of CutMix, which pastes a part of another image; 0 turns it "
        "off; with either, no sample leaves early in training", limits=(0.0, 1e6),
    )  # fmt: skip

    model: str = _option("resnet50", "model", "network of timm or torchvision, or cifar_resnet32")
    model_kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={"group": "model", "help": "options of the network, such as drop_path_rate=0.1"},
    )
    pretrained: bool = _option(
        False, "model", "start from the weights that timm or torchvision has for the network"
    )
    init_from: str | None = _option(
        None, "model", "start from the weights in a .safetensors or .pth file, or of a run",
        metavar="FILE",
    )  # fmt: skip
    freeze_backbone: str | None = _option(
        None, "model", "keep the network's parameters as they are, up to and including this "
        "module, or all of them; heads and classifier train", metavar="MODULE", const="all",
    )  # fmt: skip

    exits: tuple[str, ...] | None = _option(
        None, "exits", "modules after which to put exits; after the first three quarters of the "
        "network's stages if not given",
    )  # fmt: skip
    conv_heads: bool = _option(False, "exits", "a convolution in every head but the last")
    criterion: str | Score = _option(  # noqa: RUF009
        "confidence",
        "exits",
        "what the exit test reads; an entropy, in [0, 1], must be small to leave, so give it "
        "--thresholds of its own, such as 0.3",
        choices=criteria.TABLE,  # in Python also a callable: see `criteria.find`
    )
    thresholds: tuple[Thresholds, ...] = _option(
        (0.9,), "exits", "for the exit test at inference: one, one per exit, or for each exit one "
        "per class as 0.9,0.8,...; calibration moves them together",
    )  # fmt: skip
    train_thresholds: tuple[Thresholds, ...] | None = _option(
        None, "exits", "thresholds in training; equal to --thresholds if not given"
    )
    exit_weights: tuple[float, ...] = _option(
        (1.0,), "exits", "weights of the exits' losses: one, or one per exit, the last included",
        limits=(0.0,),
    )  # fmt: skip
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
    ] = _option("cross_entropy", "loss and sampling", "at every exit; ldam uses its own classifier")
    label_smoothing: float = _option(0.0, "loss and sampling", "in [0, 1]", limits=(0.0, 1.0))
    gamma: float = _option(2.0, "loss and sampling", "of focal", limits=(0.0,))
    beta: float = _option(
        0.9999, "loss and sampling", "of class_balanced and --drw-epoch", limits=(0.0, 1.0)
    )
    tau: float = _option(1.0, "loss and sampling", "of logit_adjusted", limits=(0.0,))
    ldam_scale: float = _option(30.0, "loss and sampling", "of ldam", limits=(0.0,))
    drw_epoch: int | None = _option(
        None,
        "loss and sampling",
        "re-weight the loss by class from this epoch on, counted from 0",
        limits=(0,),
    )
    class_weights: str | None = _option(
        None, "loss and sampling", "weights of the classes in the loss: a file with lines "
        "class,weight or, in the order of the classes, weight", metavar="FILE",
    )  # fmt: skip
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
        2e-4, "optimisation", "not applied to biases and normalisation layers", limits=(0.0,)
    )
    sched: Literal["cosine", "step"] = _option("cosine", "optimisation", "of the learning rate")
    warmup_epochs: float = _option(
        5.0, "optimisation", "epochs in which the learning rate rises", limits=(0.0, 1e9)
    )
    min_lr: float = _option(0.0, "optimisation", "where cosine ends", limits=(0.0,))
    decay_milestones: tuple[int, ...] = _option(
        (160, 180), "optimisation", "epochs at which step multiplies the rate by --decay-rate",
        limits=(0,),
    )  # fmt: skip
    decay_rate: float = _option(0.01, "optimisation", "of step", limits=(0.0, 1.0))
    layer_decay: float = _option(
        1.0, "optimisation", "the rate of each of the network's stages or blocks is this times the "
        "rate of the next one; classifiers have --lr", limits=(0.0, 1.0),
    )  # fmt: skip
    clip_grad: float | None = _option(
        None, "optimisation", "largest norm of the gradient", limits=(0.0,)
    )
    model_ema: bool = _option(
        False, "optimisation", "average the weights over steps; the average is the result"
    )
    model_ema_decay: float = _option(
        0.9998, "optimisation", "decay of the average, per step", limits=(0.0, 1.0)
    )

    device: str | None = _option(None, "speed", "cuda if there is one, else cpu")
    workers: int = _option(
        4, "speed", "processes that load images, per training process", limits=(0, 1024)
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
    seed: int = _option(0, "run", "seed of weights, order and augmentation", limits=(0, 2**63 - 1))
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
            value = convert(option.name, getattr(self, option.name), HINTS[option.name])
            object.__setattr__(self, option.name, value)
            if value is not None and "limits" in option.metadata:
                for number in value if isinstance(value, tuple) else (value,):
                    _check_limits(option.name, number, *option.metadata["limits"])
        self._check_open_limits()
        self._check_lists()
        self._check_data()
        self._check_images()
        self._check_start()
        self._check_exits()
        if self.drw_epoch is not None and self.drw_epoch >= self.epochs:
            raise ValueError(
                f"drw_epoch: expected an epoch below epochs = {self.epochs}, got {self.drw_epoch}"
            )
        if self.torchcompile is not None:
            _check_compiler(self.torchcompile)

    def _check_open_limits(self) -> None:
        for name in ("clip_grad", "ldam_scale", "layer_decay"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        for name in ("beta", "model_ema_decay"):
            if getattr(self, name) == 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1), got 1.0")

    def _check_lists(self) -> None:
        for name in ("thresholds", "train_thresholds", "exit_weights"):
            value = getattr(self, name)
            if value is not None and (not value or () in value):
                raise ValueError(f"{name}: expected at least one number, got {value}")
        if not any(self.exit_weights):
            raise ValueError(
                f"exit_weights: expected one above 0, or nothing learns, got {self.exit_weights}"
            )
        for name in ("exits", "decay_milestones"):
            value = getattr(self, name) or ()
            if len(set(value)) < len(value):
                raise ValueError(f"{name}: expected every one once, got {value}")

    def _check_data(self) -> None:
        if self.dataset == "digits":
            for name in (
                "imbalance_profile", "validation_fraction", "transforms", "img_size",
                "exif_orientation", "data_dir", "mean", "std", "interpolation", "hflip", "scale",
                "auto_augment", "reprob",
            ):  # fmt: skip
                self._check_default(name)
        elif self.data_dir is None:
            raise ValueError(
                f"data_dir: expected a folder of images (dataset {self.dataset}), got none"
            )
        if self.is_cifar:
            self._check_default("exif_orientation")
        if self.dataset in SUBSETTABLE:
            self._check_default("lists")
        else:
            for name, default in (("imbalance", None), ("validation_fraction", 0.0)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: expected {default or 'none'} for {self.dataset}, whose lists say "
                        f"what is in each part, got {getattr(self, name)}"
                    )
        if self.is_cifar and self.transforms in (None, "small") and self.img_size not in (None, 32):
            raise ValueError(
                f"img_size: expected 32 for {self.dataset} unless transforms is large, which "
                f"scales, got {self.img_size}"
            )

    def _check_images(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ValueError(
                    f"{name}: expected 3 numbers, of red, green and blue, got {len(value)}"
                )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"scale: expected two shares, 0 < smallest <= largest <= 1, got {self.scale}"
            )

    def _check_start(self) -> None:
        if self.pretrained and self.init_from is not None:
            raise ValueError(
                f"init_from: expected none with pretrained weights, got {self.init_from}"
            )
        if self.class_weights is not None and self.loss == "class_balanced":
            raise ValueError(
                "class_weights: expected none for the loss class_balanced, which computes its own, "
                f"got {self.class_weights}"
            )

    def _check_default(self, name: str) -> None:
        default = TrainConfig.__dataclass_fields__[name].default
        if getattr(self, name) != default:
            raise ValueError(
                f"{name}: expected {default} for {self.dataset}, got {getattr(self, name)}"
            )

    def _check_exits(self) -> None:
        criterion = criteria.find(self.criterion)
        for name in ("thresholds", "train_thresholds"):
            for entry in getattr(self, name) or ():
                for number in entry if isinstance(entry, tuple) else (entry,):
                    checks.threshold_values(name, number, criterion)
        if self.max_flops is not None and not self.calibrate:
            raise ValueError(
                "max_flops: expected none without calibration, which chooses the threshold, got "
                f"{self.max_flops}"
            )

    def without_effect(
        self, *, has_momentum: bool = True, has_validation: bool = True
    ) -> list[str]:
        """For each setting that differs from its default and that other settings switch off, its
        name and what it needs.

        Args:
            has_momentum, has_validation: whether the optimiser has a momentum, and the data a
                validation part.
        """
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        found = [
            f"{name} (needs {need})"
            for need, names, acts in (
                *_ACTS,
                ("an opt with momentum", ("momentum",), lambda run: has_momentum),
                ("a validation part", ("val_interval",), lambda run: has_validation),
            )
            for name in names
            if getattr(self, name) != defaults[name] and not acts(self)
        ]
        if not self.has_exits and len(self.exit_weights) > 1:
            found.append("exit_weights but the last (need exits)")
        return found

    @property
    def has_exits(self) -> bool:
        """`--no-exits` is an empty list of exits."""
        return self.exits != ()

    @property
    def is_cifar(self) -> bool:
        return self.dataset in ("cifar10", "cifar100")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def has_small_images(self) -> bool:
        """Whether images are taken at the size that they have."""
        return (self.transforms or ("small" if self.is_cifar else "large")) == "small"


def _check_limits(name: str, number: Any, low: Any, high: Any = None) -> None:
    if isinstance(low, float):
        checks.at_least(name, number, low, math.inf if high is None else high)
        return
    checks.integer(name, number, low, high)
    if number > LARGEST and high is None:
        raise ValueError(f"{name}: expected an integer of at most {LARGEST}, got {number}")


def _check_compiler(backend: str) -> None:
    import torch

    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            "torchcompile: expected a backend of torch.compile, such as "
            f"{', '.join(torch.compiler.list_backends())}, got {backend!r}"
        )


#: The annotation of every setting.
HINTS = get_type_hints(TrainConfig)
#: Data sets that the settings may make long-tailed and split.
SUBSETTABLE = ("folder", "digits", "cifar10", "cifar100")
#: What settings need to have an effect: its name, the settings, and whether a run has it.
_ACTS: tuple[tuple[str, tuple[str, ...], Callable[[TrainConfig], bool]], ...] = (
    ("exits", ("conv_heads", "criterion", "thresholds", "train_thresholds", "drop_exited",
               "calibrate", "max_flops"), lambda run: run.has_exits),
    ("loss focal", ("gamma",), lambda run: run.loss == "focal"),
    ("loss class_balanced or drw_epoch", ("beta",),
     lambda run: run.loss == "class_balanced" or run.drw_epoch is not None),
    ("loss logit_adjusted", ("tau",), lambda run: run.loss == "logit_adjusted"),
    ("loss ldam", ("ldam_scale",), lambda run: run.loss == "ldam"),
    ("sched step", ("decay_milestones", "decay_rate"), lambda run: run.sched == "step"),
    ("sched cosine", ("min_lr",), lambda run: run.sched == "cosine"),
    ("model_ema", ("model_ema_decay",), lambda run: run.model_ema),
    ("amp", ("amp_dtype",), lambda run: run.amp),
    ("imbalance", ("imbalance_profile",), lambda run: run.imbalance is not None),
    ("imbalance or validation_fraction", ("data_seed",),
     lambda run: run.dataset == "digits" or run.imbalance is not None
     or run.validation_fraction > 0),
    ("no mixup and cutmix", ("train_thresholds", "drop_exited"), lambda run: not run.mixes),
    ("transforms large", ("scale", "interpolation"),
     lambda run: run.dataset == "digits" or not run.has_small_images),
    ("images in files", ("skip_errors",),
     lambda run: run.dataset != "digits" and not run.is_cifar),
)  # fmt: skip
