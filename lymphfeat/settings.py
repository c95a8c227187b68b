"""All settings and their defaults, as frozen dataclasses that are checked on creation."""

from dataclasses import dataclass, field

from lymphfeat.errors import SettingsError


def require(condition: bool, message: str) -> None:
    """Raise SettingsError with `message` unless `condition` holds."""
    if not condition:
        raise SettingsError(message)


def _require_at_least(value: float | None, least: float, name: str) -> None:
    require(value is None or value >= least, f"{name} (={value}) must be at least {least:g}.")


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """The backbone and its input: with the weights' hash, all that a feature map depends on."""

    backbone: str = "resnet18"
    # auto (bloodcells for resnet18, else none) | bloodcells | none | imagenet | a file
    weights: str = "auto"
    crop: int = 112  # side of the centre crop in pixels (report §4.1)
    normalization: str = "imagenet"  # or "challenge" (METHOD §3)
    output_stride: int | None = None  # 8, 16 or 32; None: the backbone's own
    weights_seed: int = 0  # initialises weights "none"

    def __post_init__(self) -> None:
        _require_at_least(self.crop, 8, "crop")


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """One head: a linear scorer and an aggregator, and how it is trained (METHOD §2).

    k counts instances of `unit`; with `k_percent` it is max(k_min, ceil(k_percent / 100 · n)), both
    in training and in prediction, and never more than the patient has.
    """

    agg: str = "topk"
    unit: str = ""  # "pixel" | "image"; "": the aggregator's default
    k_train: int = 1
    k_agg: int = 10
    k_percent: float | None = None
    k_min: int = 1
    reduce: str = "mean"  # "mean" | "max" of the selected instances' probabilities
    loss: str = "instance"  # ranking family: "instance", or "bag" (mean of the selected logits)
    temperature: float = 1.0  # lse
    momentum: float = 0.1  # bnsigmoid's running statistics
    width: int = 128  # networks: hidden units of attention, of embeddings, of each direction
    layers: int = 1  # transformer, lstm
    class_weights: str = "none"  # or "balanced": equal weight for both classes in the loss
    # For heads on frozen maps, by measurement (docs/heads.md); 1e-4 is for whole networks.
    lr: float = 0.003
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("k_train", "k_agg", "k_min", "width", "layers"):
            _require_at_least(getattr(self, name), 1, name)
        require(
            self.k_percent is None or 0 < self.k_percent <= 100,
            f"k_percent (={self.k_percent}) must lie in (0, 100].",
        )
        _require_one_of(self.unit, ("", "pixel", "image"), "unit")
        _require_one_of(self.reduce, ("mean", "max"), "reduce")
        _require_one_of(self.loss, ("instance", "bag"), "loss")
        require(self.temperature > 0, f"temperature (={self.temperature}) must be above 0.")
        require(0 < self.momentum <= 1, f"momentum (={self.momentum}) must lie in (0, 1].")
        _require_one_of(self.class_weights, ("none", "balanced"), "class_weights")
        require(self.lr > 0, f"lr (={self.lr}) must be above 0.")
        _require_at_least(self.weight_decay, 0, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class HeadGrid:
    """Values of head settings; every combination is one head (`heads.grid.expand`).

    An empty field leaves a setting at its default; a setting that an aggregator does not read adds
    no heads of it. `k_percent` given with `k_agg` adds heads because k is one or the other.
    """

    agg: tuple[str, ...] = ("topk",)  # or a family (ranking, weighted, network), or all
    unit: tuple[str, ...] = ()
    k_train: tuple[int, ...] = ()
    k_agg: tuple[int, ...] = ()
    k_percent: tuple[float, ...] = ()
    k_min: tuple[int, ...] = ()
    reduce: tuple[str, ...] = ()
    loss: tuple[str, ...] = ()
    temperature: tuple[float, ...] = ()
    momentum: tuple[float, ...] = ()
    width: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    class_weights: tuple[str, ...] = ()
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()


def _require_one_of(value: str, allowed: tuple[str, ...], name: str) -> None:
    shown = ", ".join(option or '""' for option in allowed)
    require(value in allowed, f"{name} (={value}) must be one of {shown}.")


_RULES = ("prevalence", "best-ba", "0.5")


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How heads are fitted on a store and measured (METHOD §3–4)."""

    protocol: str = "honest"  # or "report"
    seeds: int = 10  # random splits under "report", repeats of k-fold under "honest"
    folds: int = 5
    epochs: int = 40
    batch_size: int = 16  # patients (weighted family) or instances (ranking family)
    images_per_patient: int | None = None  # drawn at every step; None: all
    views: int | None = None  # stored views, one drawn per image at every step; None: all
    tta: bool = False  # evaluate the mean over those views instead of the identity view
    evaluate_every: int = 1  # epochs; `report` takes the ten best of those evaluated
    epoch: str = "last"  # or "nested": the best within each training set (honest)
    fusions: tuple[str, ...] = ()  # late, sum, experts, all (METHOD §5)
    attributes: tuple[str, ...] = ()  # clinical columns; empty: all
    log_attributes: tuple[str, ...] = ("lymph_count",)  # log-transformed
    calibration: str = "platt"  # | "temperature" | "none"
    threshold: str = "prevalence"  # | "best-ba" | "0.5" (honest); see decision.learn_threshold
    allow_shared_images: bool = False  # between training and validation patients: a leak
    seed: int = 0  # first of the seeds
    precision: str = "float32"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _require_one_of(self.protocol, ("honest", "report"), "protocol")
        _require_one_of(self.epoch, ("last", "nested"), "epoch")
        _require_one_of(self.calibration, ("platt", "temperature", "none"), "calibration")
        _require_one_of(self.threshold, _RULES, "threshold")
        require(
            self.epoch == "last" or self.protocol == "honest",
            "epoch (=nested) must go with --protocol honest; report takes the ten best epochs.",
        )
        for name in (
            "seeds",
            "epochs",
            "batch_size",
            "images_per_patient",
            "views",
            "evaluate_every",
        ):
            _require_at_least(getattr(self, name), 1, name)
        require(
            self.evaluate_every <= self.epochs,
            f"evaluate_every (={self.evaluate_every}) must be at most epochs (={self.epochs}).",
        )
        # Out-of-fold thresholds leave two folds out at a time: at least one must remain.
        _require_at_least(self.folds, 3, "folds")
        _require_at_least(self.threads, 1, "threads")


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings:
    """How a head and its backbone are trained together (report §4, METHOD §3)."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    head: HeadSettings = field(default_factory=lambda: HeadSettings(agg="bnsigmoid", lr=1e-4))
    epochs: int = 40
    batch_size: int = 16  # patients (weighted family) or images (ranking family)
    images_per_patient: int | None = None  # drawn at every step; None: all
    max_forward_size: int = 512  # images per chunk without gradients
    max_backward_size: int = 512  # images that get gradients in one step
    gradient: str = "subset"  # "subset" (report, pseudo-code 2) or "exact"
    frozen_batchnorm: bool = False  # keep the backbone's batch-norm statistics as loaded
    no_grad_batchnorm: str = "train"  # batch-norm in the chunks without gradients: train | eval
    head_lr: float | None = None  # None: same as head.lr
    layer_decay: float = 1.0  # learning-rate multiplier per stage downward
    freeze_stages: int = 0  # number of stages to freeze, from the stem up
    init_head: str | None = None  # a run of fit-head; training starts from its best head
    flips: bool = True
    # Strengths; 0 is off (report §4.1: they "heavily impaired the accuracy"). See
    # finetuning.augmentation.
    colour_jitter: float = 0.0
    affine: float = 0.0
    validation: float = 0.0  # share of labelled patients held out to draw the curves
    # Decision threshold: prevalence | best-ba (with folds) | 0.5; see decision.learn_threshold.
    threshold: str = "prevalence"
    tta: bool = False  # predict the mean over the four flips
    allow_shared_images: bool = False  # between training and held-out patients: a leak
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_forward_size", "max_backward_size"):
            _require_at_least(getattr(self, name), 1, name)
        _require_at_least(self.images_per_patient, 1, "images_per_patient")
        _require_at_least(self.freeze_stages, 0, "freeze_stages")
        require(
            0 < self.layer_decay <= 1,
            f"layer_decay (={self.layer_decay}) must lie in (0, 1].",
        )
        for name in ("colour_jitter", "affine"):
            strength = getattr(self, name)
            require(0 <= strength < 1, f"{name} (={strength}) must lie in [0, 1).")
        _require_one_of(self.gradient, ("subset", "exact"), "gradient")
        _require_one_of(self.no_grad_batchnorm, ("train", "eval"), "no_grad_batchnorm")
        require(0 <= self.validation < 1, f"validation (={self.validation}) must lie in [0, 1).")
        _require_one_of(self.threshold, _RULES, "threshold")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """How a backbone is pre-trained on unlabelled cells."""

    backbone: str = "resnet18"
    init: str = "auto"  # the weights to start from, as BackboneSettings.weights
    epochs: int = 10  # an epoch draws as many pairs as there are images
    minutes: float | None = None  # train for about this many minutes instead
    batch_size: int = 64  # pairs of views
    view_size: int = 96  # side of a view in pixels
    field: int = 144  # side, in pixels, of the central region views are taken from
    zoom: tuple[float, float] = (0.8, 1.15)  # magnification of a view
    # Share of pairs made of two cells of one patient; the rest are two views of one cell.
    patient_pairs: float = 0.0
    supervised: float = 0.1  # weight of the classification loss, if folders are classes
    projection: int = 1024  # width of the projector, used only in pre-training
    lr: float = 1e-3
    weight_decay: float = 1e-3
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "projection", "threads"):
            _require_at_least(getattr(self, name), 1, name)
        require(
            self.minutes is None or self.minutes > 0, f"minutes (={self.minutes}) must be above 0."
        )
        _require_at_least(self.batch_size, 2, "batch_size")
        _require_at_least(self.view_size, 32, "view_size")
        _require_at_least(self.field, 32, "field")
        require(
            0 < self.zoom[0] <= self.zoom[1],
            f"zoom (={self.zoom}) must be two factors above 0, low then high.",
        )
        require(
            0 <= self.patient_pairs <= 1,
            f"patient_pairs (={self.patient_pairs}) must lie in [0, 1].",
        )
        _require_at_least(self.supervised, 0, "supervised")
        require(self.lr > 0, f"lr (={self.lr}) must be above 0.")
        _require_at_least(self.weight_decay, 0, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """How images become a feature store."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    views: int = 1  # the first N of: identity, hflip, vflip, both
    precision: str = "auto"  # auto | float32 | bfloat16
    batch_size: int = 64  # images; part of the recipe because rounding may depend on it
    # How one backbone per split is fine-tuned. Its backbone, precision, device and threads are
    # taken from these settings, its seed from the split. None: no fine-tuning.
    finetune: EndToEndSettings | None = None
    device: str = "auto"
    threads: int | None = None  # None: all cores

    def __post_init__(self) -> None:
        _require_at_least(self.batch_size, 1, "batch_size")
        _require_at_least(self.threads, 1, "threads")
