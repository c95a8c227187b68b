"""Every setting and its default, as frozen values that are checked when they are made."""

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
    """Which backbone sees what: together with the weights' hash, what a feature map depends on."""

    backbone: str = "resnet18"
    # auto (bloodcells for resnet18, else none) | bloodcells | none | imagenet | a file
    weights: str = "auto"
    crop: int = 112  # pixels, about the image's centre (report §4.1)
    normalization: str = "imagenet"  # or "challenge" (METHOD §3)
    output_stride: int | None = None  # 8, 16 or 32; None is the backbone's own
    weights_seed: int = 0  # initialises weights "none"

    def __post_init__(self) -> None:
        _require_at_least(self.crop, 8, "crop")


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """One head: a linear scorer and an aggregator, and how it is trained (METHOD §2).

    k counts instances of `unit`; with `k_percent` it is max(k_min, ceil(k_percent / 100 · n)) for
    learning and for the patient probability alike, and never more than the patient has.
    """

    agg: str = "topk"
    unit: str = ""  # "pixel" | "image"; "" is the aggregator's own
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
    class_weights: str = "none"  # or "balanced": both classes count alike in the loss
    # For heads on frozen maps, by measurement (docs/heads.md); report's 1e-4 is for whole nets.
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
    """Values of head settings, every combination of which is a head (`heads.expand`).

    An empty field leaves a setting at its default; a setting that an aggregator does not read makes
    no further heads of it. `k_percent` beside `k_agg` adds heads, for k is one or the other.
    """

    agg: tuple[str, ...] = ("topk",)  # or a family: ranking, weighted, network; or all of them
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
    seeds: int = 10  # runs under "report", repeats of k-fold under "honest"
    folds: int = 5
    epochs: int = 40
    batch_size: int = 16  # patients (weighted family) or instances (ranking family)
    images_per_patient: int | None = None  # drawn anew at every step; None is all
    views: int | None = None  # of the store's, one drawn for every image at every step; None is all
    tta: bool = False  # evaluate the mean over those views, not the identity alone
    evaluate_every: int = 1  # epochs, of which `report` takes its ten best
    epoch: str = "last"  # or "nested": the best inside each training set (honest)
    fusions: tuple[str, ...] = ()  # late, sum, experts, all (METHOD §5)
    attributes: tuple[str, ...] = ()  # clinical columns; none is all there are
    log_attributes: tuple[str, ...] = ("lymph_count",)  # taken as logarithms
    calibration: str = "platt"  # | "temperature" | "none"
    threshold: str = "prevalence"  # | "best-ba" | "0.5" (honest); see decision.learn_threshold
    allow_shared_images: bool = False  # in training and validation patients: a leak
    seed: int = 0  # the first of the seeds
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
            "epoch (=nested) must go with --protocol honest; report takes each run's ten best.",
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
    images_per_patient: int | None = None  # drawn anew at every step; None is all
    max_forward_size: int = 512  # images a chunk without gradients
    max_backward_size: int = 512  # images that get gradients in one step
    gradient: str = "subset"  # "subset" (report, pseudo-code 2) or "exact"
    frozen_batchnorm: bool = False  # keep the backbone's batch-norm statistics as loaded
    no_grad_batchnorm: str = "train"  # batch-norm in the chunks without gradients: train | eval
    head_lr: float | None = None  # None is the head's lr for all
    layer_decay: float = 1.0  # a stage learns at so many times the rate of the stage above it
    freeze_stages: int = 0  # of the backbone, from the stem up: they keep their weights
    init_head: str | None = None  # a run of fit-head whose best head training begins with
    flips: bool = True
    # Strengths, 0 is off (report §4.1: they "heavily impaired the accuracy"); see endtoend.views.
    colour_jitter: float = 0.0
    affine: float = 0.0
    validation: float = 0.0  # share of labelled patients held out to draw the curves
    # Who is called tumoral: prevalence | best-ba (with folds) | 0.5; see decision.learn_threshold.
    threshold: str = "prevalence"
    tta: bool = False  # predict the mean over the four flips
    allow_shared_images: bool = False  # in training and held-out patients: a leak
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
    """How a backbone learns from cells without labels."""

    backbone: str = "resnet18"
    init: str = "auto"  # the weights to start from, as BackboneSettings.weights
    epochs: int = 10  # an epoch draws as many pairs as there are images
    minutes: float | None = None  # train about so long instead: epochs follow from the speed
    batch_size: int = 64  # pairs of views
    view_size: int = 96  # pixels of a view's side
    field: int = 144  # pixels about the image's centre that views are taken from
    zoom: tuple[float, float] = (0.8, 1.15)  # magnification of a view
    # Share of pairs that are two cells of one patient; the others are two views of one cell.
    patient_pairs: float = 0.0
    supervised: float = 0.1  # weight of the classes' cross-entropy, where folders are classes
    projection: int = 1024  # width of the projector, which only the pre-training uses
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
    views: int = 1  # identity, hflip, vflip, both: the first so many
    precision: str = "auto"  # auto | float32 | bfloat16
    batch_size: int = 64  # images; part of the recipe, for rounding may depend on it
    # How backbones are fine-tuned, one a split; its backbone, seed, precision, device and threads
    # are these settings' and the split's. None trains nothing.
    finetune: EndToEndSettings | None = None
    device: str = "auto"
    threads: int | None = None  # None is all cores

    def __post_init__(self) -> None:
        _require_at_least(self.batch_size, 1, "batch_size")
        _require_at_least(self.threads, 1, "threads")
