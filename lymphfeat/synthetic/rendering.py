"""Rendered smears: one lymphocyte in the middle, surrounded by red cells and platelets.

* A pixel's colour is `ground * exp(-optical density)`: overlapping red cells darken each other, as
  they do under a microscope, and a patient's stain is a factor on the densities.
* Lengths are in pixels of the 224 px frame, and are scaled to the frame size requested.
* Atypical cells are drawn as normal ones and then shifted, trait by trait, as haematologists
  describe them; at difficulty 1 the shift is zero. Everything that differs is inside the cell, and
  so in the centre half of the frame.
* Soft edges and blurred densities imitate the focus, without blurring the whole frame.
"""

from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Float = NDArray[np.float32]

FRAME = 224  # px, the challenge's images
_CELL_PATCH = 112  # px, the frame's middle, which holds the whole lymphocyte
_RED_PATCH = 58  # px, holds one red cell
_REACH = 51  # px, the furthest that a cell's border is from its middle
_ANGLES = 360  # entries of a table radius(angle)
_ANGLE = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
_COSINES, _SINES = (wave(np.arange(64)[:, None] * _ANGLE) for wave in (np.cos, np.sin))
_PROFILE = 160  # entries of a table thickness(squared distance) from centre to outline

_GROUND = np.array([254, 229, 203], np.float32)
_BLUE_GROUND = np.array([226, 219, 232], np.float32)  # some slides have been buffered bluish
_RED_CELL = np.array([0.21, 0.32, 0.205], np.float32)
_NUCLEUS = np.array([1.26, 2.05, 0.47], np.float32)
_PALE_CYTOPLASM = np.array([0.36, 0.42, 0.07], np.float32)
_BASOPHILIC_CYTOPLASM = np.array([1.00, 1.02, 0.22], np.float32)
_PLATELET = np.array([0.55, 0.95, 0.18], np.float32)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What one lymphocyte looks like."""

    nucleus: float  # px, radius
    cytoplasm: float  # px, cell radius less nuclear radius
    irregularity: float  # 0 = a smooth oval
    cleft: float  # depth of the indentation, in nuclear radii
    cleft_width: float  # radians
    grain: float  # px, size of the chromatin clumps
    contrast: float  # of the chromatin
    density: float  # of the nucleus; 1 = dark
    nucleolus: float  # 0 = none .. 1 = clear
    basophilia: float  # 0 = pale .. 1 = deep blue cytoplasm


TRAITS = tuple(trait.name for trait in fields(Traits))
_LOWEST = np.array(astuple(Traits(
    nucleus=22, cytoplasm=1, irregularity=0, cleft=0, cleft_width=0.05,
    grain=0.7, contrast=0.3, density=0.5, nucleolus=0, basophilia=0,
)))  # fmt: skip
_HIGHEST = np.array(astuple(Traits(
    nucleus=36, cytoplasm=13, irregularity=0.1, cleft=0.6, cleft_width=0.6,
    grain=2.4, contrast=1.5, density=1.2, nucleolus=1, basophilia=1.2,
)))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a patient's cells depart from those drawn: spread round `middle`, moved to `centre`."""

    middle: NDArray[np.float64]  # (T,) mean of the traits as drawn
    centre: NDArray[np.float64]  # (T,) mean of the patient's
    spread: float  # factor on the deviations from the mean: the smaller, the more alike


@dataclass(frozen=True, kw_only=True)
class Slide:
    """What all images of a patient share: stain, focus, crowding and the look of normal cells."""

    ground: Float  # (3,) colour without a cell, 0..255
    stain: Float  # (3,) factor on the optical densities
    focus: float  # px, softness of edges
    noise: float  # grey levels, of the camera
    spacing: float  # px between red cells
    pallor: float  # 0..1, how bright the centres of red cells are
    large_share: float  # share of normal lymphocytes that are large, with abundant pale cytoplasm
    bean_share: float  # share of normal nuclei that are broadly indented
    chromatin: float  # offset of this patient's normal openness of the nucleus
    basophilia: float  # offset of this patient's normal blueness of the cytoplasm
    look: Look | None = None  # of this patient's cells; None: as they are drawn


def draw_slide(rng: np.random.Generator) -> Slide:
    """Draw one patient's slide."""
    bluish = 0.85 if rng.random() < 0.08 else 0.12 * rng.random()
    ground = _GROUND + bluish * (_BLUE_GROUND - _GROUND) + rng.normal(0, 1.5, 3)
    stain = rng.normal(1, 0.08) * rng.normal(1, 0.045, 3)
    return Slide(
        ground=ground.astype(np.float32),
        stain=np.clip(stain, 0.7, 1.3).astype(np.float32),
        focus=float(rng.uniform(0.6, 1.1)),
        noise=float(rng.uniform(1.0, 2.2)),
        spacing=float(rng.uniform(43, 58)),
        pallor=float(rng.uniform(0.4, 0.85)),
        large_share=float(rng.beta(1.0, 2.5)),
        bean_share=float(rng.beta(1.0, 3.0)),
        chromatin=float(rng.normal(0, 0.09)),
        basophilia=float(rng.normal(0, 0.16)),
    )


def draw_traits(
    rng: np.random.Generator, atypical: bool, difficulty: float, slide: Slide, large: bool
) -> Traits:
    """Draw a lymphocyte; an atypical one is shifted from normal by `1 - difficulty`."""
    # How strongly this cell shows each trait: no two atypical cells are alike.
    shift = (1 - difficulty) * rng.uniform(0.85, 1.45, 8) * atypical
    bean = rng.random() < slide.bean_share  # normal nuclei may be indented too: broadly, not deeply
    traits = Traits(
        nucleus=rng.normal(30.5 if large else 27.5, 1.5) + 4 * shift[0],
        cytoplasm=rng.normal(9 if large else 3, 1.5) + 2 * shift[1],
        irregularity=abs(rng.normal(0.02, 0.012)) + 0.03 * shift[2],
        cleft=abs(rng.normal(0.14 if bean else 0.0, 0.05)) + 0.42 * shift[3],
        cleft_width=rng.uniform(0.35, 0.6) - 0.2 * shift[3],
        grain=rng.normal(1.75, 0.2) - 0.9 * shift[4],
        contrast=rng.normal(1.0, 0.15) - 0.3 * shift[4],
        density=rng.normal(0.90 if large else 1.0, 0.06) - slide.chromatin - 0.4 * shift[5],
        nucleolus=(rng.random() < 0.08) * 0.3 + 1.2 * shift[6],
        basophilia=rng.normal(0.15 if large else 0.4, 0.12) + slide.basophilia + 0.9 * shift[7],
    )
    values = np.clip(astuple(traits), _LOWEST, _HIGHEST)  # (T,)
    if slide.look is not None:
        moved = slide.look.centre + slide.look.spread * (values - slide.look.middle)
        values = np.clip(moved, _LOWEST, _HIGHEST)
    return Traits(**dict(zip(TRAITS, values.tolist(), strict=True)))


def render_cell(
    rng: np.random.Generator,
    atypical: bool,
    difficulty: float,
    *,
    slide: Slide | None = None,
    large: bool | None = None,
    size: int = FRAME,
) -> NDArray[np.uint8]:
    """Render one lymphocyte among red cells, (size, size, 3) uint8 RGB.

    difficulty: 0 = an atypical cell differs clearly .. 1 = not at all.
    slide: the patient's slide; drawn if None.
    large: whether the cell has abundant pale cytoplasm; drawn from the slide's share if None.
    """
    drawn = _draw_cell(rng, atypical, difficulty, slide, large, size)
    slide, cell = drawn.slide, drawn.cell
    covered = cell.covered
    density = _RED_CELL[:, None, None] * _red_cells(
        rng, slide, drawn.radius, drawn.middle, size
    )  # (3, size, size)
    _add_platelets(rng, density, slide, size / FRAME)
    window = np.s_[:, *_patch(size, len(covered))]
    density[window] = density[window] * (1 - covered) + cell.density
    return _photograph(rng, density, slide)


def cell_extent(
    rng: np.random.Generator,
    atypical: bool,
    difficulty: float,
    *,
    slide: Slide | None = None,
    large: bool | None = None,
    size: int = FRAME,
) -> Float:
    """Return the extent of the cell that `render_cell` draws with an equal generator.

    (size, size): 1 inside the cell, 0 outside, between them on its soft edge.
    """
    covered = _draw_cell(rng, atypical, difficulty, slide, large, size).cell.covered
    extent = np.zeros((size, size), np.float32)
    extent[_patch(size, len(covered))] = covered
    return extent


def _patch(size: int, side: int) -> tuple[slice, slice]:
    """Place a cell's patch in the middle of the image."""
    begin = (size - side) // 2
    return np.s_[begin : begin + side, begin : begin + side]


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    slide: Slide
    radius: float  # px in a frame of FRAME
    middle: NDArray[np.float64]  # (2,) likewise, off the frame's
    cell: "_Cell"


def _draw_cell(
    rng: np.random.Generator,
    atypical: bool,
    difficulty: float,
    slide: Slide | None,
    large: bool | None,
    size: int,
) -> _Drawn:
    slide = draw_slide(rng) if slide is None else slide
    large = bool(rng.random() < slide.large_share) if large is None else large
    traits = draw_traits(rng, atypical, difficulty, slide, large)
    middle = rng.uniform(-3, 3, 2)  # px: the cell finder's error
    return _Drawn(
        slide=slide,
        radius=traits.nucleus + traits.cytoplasm,
        middle=middle,
        cell=_lymphocyte(rng, traits, slide, middle, size / FRAME),
    )


# --- the lymphocyte ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Cell:
    density: Float  # (3, p, p)
    covered: Float  # (p, p), 1 inside the cell


def _lymphocyte(
    rng: np.random.Generator,
    traits: Traits,
    slide: Slide,
    middle: NDArray[np.float64],
    scale: float,
) -> _Cell:
    side = round(_CELL_PATCH * scale)
    axis = ((np.arange(side) - (side - 1) / 2) / scale).astype(np.float32)
    y, x = axis[:, None] - np.float32(middle[0]), axis[None, :] - np.float32(middle[1])
    edge = max(slide.focus, 0.5 / scale)
    direction = rng.uniform(0, 2 * np.pi)
    off = 0.8 * traits.cytoplasm * np.sqrt(rng.random())
    dy, dx = np.float32(off * np.sin(direction)), np.float32(off * np.cos(direction))

    rim = _inside(x, y, _cell_outline(rng, traits))  # (p, p) px inside the outline
    outline = np.minimum(_nucleus_outline(rng, traits), np.float32(_REACH - off))
    depth = _inside(x - dx, y - dy, outline)  # likewise, of the nucleus
    covered, nucleus = _step(rim, edge), _step(depth, edge)
    covered = np.maximum(covered, nucleus)
    chromatin = nucleus * _chromatin(rng, traits, x - dx, y - dy, depth, scale)
    cytoplasm = (covered - nucleus) * _granules(rng, rim, scale)
    colour = _PALE_CYTOPLASM + np.float32(traits.basophilia) * (
        _BASOPHILIC_CYTOPLASM - _PALE_CYTOPLASM
    )
    blur = 0.55 * slide.focus * scale
    density = (
        _NUCLEUS[:, None, None] * gaussian_filter(chromatin, blur, truncate=2.5)
        + colour[:, None, None] * cytoplasm
    )
    return _Cell(density=density, covered=covered)


def _cell_outline(rng: np.random.Generator, traits: Traits) -> Float:
    """Return radius(angle), (360,): an oval, ruffled in places, occasionally with a bleb."""
    table = (traits.nucleus + traits.cytoplasm) * (1 + _harmonics(rng, 2, 6, 0.022))
    ruffled = np.clip(_harmonics(rng, 1, 4, 0.7), 0, 1.5)
    table += ruffled * _harmonics(rng, 12, 60, rng.uniform(0.05, 0.22))
    for _ in range(rng.poisson(0.6)):
        table += rng.uniform(2, 6) * _bump(rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.2))
    return np.asarray(np.minimum(table, _REACH), np.float32)


def _nucleus_outline(rng: np.random.Generator, traits: Traits) -> Float:
    """Return radius(angle), (360,): an oval, irregular or cleft as the traits say."""
    table = 1 + _harmonics(rng, 2, 2, 0.05) + _harmonics(rng, 3, 6, traits.irregularity)
    notch = _bump(rng.uniform(0, 2 * np.pi), traits.cleft_width)
    return np.float32(traits.nucleus) * table * (1 - np.float32(traits.cleft) * notch)


def _chromatin(
    rng: np.random.Generator, traits: Traits, x: Float, y: Float, depth: Float, scale: float
) -> Float:
    """Return the nucleus's density, (p, p): clumps with paler gaps, a darker rim, a nucleolus."""
    clumps = _grain(rng, depth.shape, traits.grain * scale)
    clumps += np.float32(0.6) * _grain(rng, depth.shape, 0.75 * scale)
    gaps = np.clip(clumps - 0.35, 0, 2) - np.float32(0.15) * np.clip(-clumps, 0, 2)
    density = np.float32(1.05) - np.float32(0.20 * traits.contrast) * gaps
    density += np.float32(0.15) * np.exp(-np.square(depth / 2))
    if traits.nucleolus > 0:
        radius, angle = rng.uniform(3.5, 5.5), rng.uniform(0, 2 * np.pi)
        at = 0.4 * traits.nucleus * np.sqrt(rng.random())
        away = np.hypot(x - np.float32(at * np.cos(angle)), y - np.float32(at * np.sin(angle)))
        pale, ring = _step(np.float32(radius) - away, 1.2), np.exp(-np.square(away - radius) / 3)
        density += np.float32(traits.nucleolus) * (np.float32(0.15) * ring - 0.4 * pale)
    return np.asarray(np.float32(traits.density) * density, np.float32)


def _granules(rng: np.random.Generator, rim: Float, scale: float) -> Float:
    """Return the cytoplasm's density, (p, p): mottled, darker at the border."""
    mottle = _grain(rng, rim.shape, 1.2 * scale)
    return np.asarray(
        1 + np.float32(0.12) * mottle + np.float32(0.35) * np.exp(-np.square(rim / 1.6)), np.float32
    )


# --- the surroundings -------------------------------------------------------------------------


def _red_cells(
    rng: np.random.Generator,
    slide: Slide,
    radius: float,
    middle: NDArray[np.float64],
    size: int,
) -> Float:
    """Return the thickness of the red cells, (size, size), more where some overlap."""
    scale = size / FRAME
    centres = _red_centres(rng, slide.spacing, radius, middle)  # (K, 2) px from the frame's middle
    side = round(_RED_PATCH * scale)
    at = (centres + FRAME / 2) * scale  # (K, 2)
    corners = np.floor(at).astype(int) - side // 2
    axes = (np.arange(side) - (at - corners)[..., None]).astype(np.float32) / np.float32(scale)
    discs = _draw_discs(rng, slide, len(centres), max(1.3 * slide.focus, 0.6 / scale))
    canvas = np.zeros((size + 2 * side, size + 2 * side), np.float32)
    for k, (top, left) in enumerate(corners + side):
        patch = _disc(discs.axes[k], discs.lobe[k], discs.profile[k], *axes[k])
        canvas[top : top + side, left : left + side] += patch
    thickness = canvas[side:-side, side:-side]
    # Where cells overlap, the photograph darkens by less than the sum of both.
    return np.asarray(thickness - np.float32(0.6) * np.maximum(thickness - 1.05, 0), np.float32)


def _red_centres(
    rng: np.random.Generator, spacing: float, radius: float, middle: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scatter red cells on a jittered lattice, none under the lymphocyte."""
    steps = np.arange(-4, 5, dtype=np.float64)
    lattice = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)  # (81, 2)
    lattice[:, 1] += 0.5 * (lattice[:, 0] % 2)
    lattice = (lattice + rng.uniform(-0.5, 0.5, 2)) * spacing * np.array([0.87, 1.0])
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centres = (lattice[:, :, None] * turn).sum(1) + rng.normal(0, 0.17 * spacing, lattice.shape)
    away = np.linalg.norm(centres - middle, axis=1)
    least = radius + rng.uniform(17, 26, len(centres))
    outward = np.maximum(least / np.maximum(away, 1e-6), 1)[:, None]
    centres = middle + (centres - middle) * outward
    seen = np.abs(centres).max(1) < FRAME / 2 + 22
    kept = seen & (away > 0.6 * least) & (rng.random(len(centres)) < 0.82)
    return np.asarray(centres[kept])


@dataclass(frozen=True, kw_only=True)
class _Discs:
    """The K red cells of a frame."""

    axes: Float  # (K, 2, 2): a pixel (y, x) is at axes @ (y, x), of length 1 on the outline
    lobe: Float  # (K,) size of the third harmonic
    profile: Float  # (K, 2 * _PROFILE) thickness at a squared distance, from 0 to 2


def _draw_discs(rng: np.random.Generator, slide: Slide, count: int, edge: float) -> _Discs:
    radius = np.clip(rng.normal(20.5, 1.5, count), 17, 23.5)
    ratio = np.clip(rng.normal(0, 0.06, count), -0.13, 0.13)
    angle = rng.uniform(0, 2 * np.pi, count)
    along, across = (1 + ratio) / radius, (1 - ratio) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[along * sin, along * cos], [across * cos, -across * sin]])  # (2, 2, K)
    # Any larger, and a corner of the patch would fall inside the cell.
    lobe = np.clip(rng.normal(0, 0.025, count), -0.055, 0.055)
    square = np.arange(2 * _PROFILE) / _PROFILE
    width = rng.uniform(0.36, 0.62, (count, 1))
    dip = np.clip(rng.normal(slide.pallor, 0.18, (count, 1)), 0, 0.95)
    hollow = dip * np.exp(-np.square(square / (width * width)))
    thickness = rng.normal(0.90, 0.08, (count, 1)) * (1 - hollow + 0.13 * square * square)
    rim = np.asarray((1 - np.sqrt(square)) * radius[:, None], np.float32)
    return _Discs(
        axes=axes.transpose(2, 0, 1).astype(np.float32),
        lobe=lobe.astype(np.float32),
        profile=(_step(rim, edge) * thickness).astype(np.float32),
    )


def _disc(axes: Float, lobe: np.float32, profile: Float, y: Float, x: Float) -> Float:
    """Return one red cell's thickness, (s, s), at the pixels y (s,) and x (s,) from its centre."""
    u = axes[0, 0] * y[:, None] + axes[0, 1] * x
    v = axes[1, 0] * y[:, None] + axes[1, 1] * x
    v *= v
    square = u * u
    square += v  # (s, s), 1 on the outline of the oval
    v *= -4
    v += square
    u *= v  # the third harmonic, u³ - 3uv²
    u *= lobe
    u += 1
    square *= u
    square *= _PROFILE
    return np.asarray(profile.take(square.astype(np.intp), mode="clip"))


def _add_platelets(rng: np.random.Generator, density: Float, slide: Slide, scale: float) -> None:
    """Add a few small granular violet discs, but none on the lymphocyte."""
    size, side = density.shape[1], round(16 * scale)
    axis = (np.arange(side, dtype=np.float32) - (side - 1) / 2) / np.float32(scale)
    for _ in range(rng.poisson(0.7)):
        top, left = rng.integers(0, size - side, 2)
        if max(abs(top + side / 2 - size / 2), abs(left + side / 2 - size / 2)) < 60 * scale:
            continue
        radius = rng.uniform(3, 5)
        away = np.hypot(axis[:, None] * np.float32(rng.uniform(0.8, 1.2)), axis[None, :])
        disc = _step(np.float32(radius) - away, max(slide.focus, 0.5 / scale))
        disc *= 1 + np.float32(0.5) * _grain(rng, disc.shape, 1.1 * scale)
        density[:, top : top + side, left : left + side] += _PLATELET[:, None, None] * disc


def _photograph(rng: np.random.Generator, density: Float, slide: Slide) -> NDArray[np.uint8]:
    """Turn optical densities (3, s, s) into a lit, noisy photograph (s, s, 3)."""
    size = density.shape[1]
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    tilt = rng.normal(0, 0.012, 2).astype(np.float32)
    light = 1 + tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :]  # (s, s)
    photograph = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # one at a time, in place, to stay in the processor's cache
        level = density[channel]
        level *= -slide.stain[channel]
        np.exp(level, out=level)
        level *= light
        level *= slide.ground[channel]
        level += np.float32(slide.noise) * _white_noise(rng, level.shape)
        level += np.float32(0.5)  # rounds
        photograph[..., channel] = np.clip(level, 0, 255, out=level)
    return photograph


# --- shapes and textures ----------------------------------------------------------------------


def _harmonics(rng: np.random.Generator, low: int, high: int, amplitude: float) -> Float:
    """Return a random periodic function of the angle, (360,), of the orders `low`..`high`."""
    count = high - low + 1
    sizes = rng.normal(0, amplitude, count)
    phases = rng.uniform(0, 2 * np.pi, count)
    weights = np.concatenate([sizes * np.cos(phases), -sizes * np.sin(phases)])[:, None]
    waves = np.concatenate([_COSINES[low : high + 1], _SINES[low : high + 1]])
    # Not a matrix product: with this few numbers, waking the threads of BLAS takes longer.
    return np.asarray((weights * waves).sum(0), np.float32)


def _bump(angle: float, width: float) -> Float:
    """Return a bell curve of height 1 around `angle`, (360,); `width` in radians."""
    away = (_ANGLE - angle + np.pi) % (2 * np.pi) - np.pi
    return np.exp(-np.square(away / width)).astype(np.float32)


def _inside(x: Float, y: Float, outline: Float) -> Float:
    """Return each pixel's distance from the outline along its ray, px, negative outside."""
    angle = np.arctan2(y, x) * np.float32(_ANGLES / (2 * np.pi))  # -180..180
    return np.asarray(outline[angle.astype(np.intp) % _ANGLES] - np.sqrt(x * x + y * y), np.float32)


def _step(distance: Float, edge: float) -> Float:
    """Return 0 outside .. 1 inside, smooth over `edge` px on either side."""
    t = np.clip(distance / np.float32(2 * edge) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _grain(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Float:
    """Return smooth noise with mean 0 and variance about 1."""
    noise = gaussian_filter(_white_noise(rng, shape), sigma, truncate=2.5)
    return np.asarray(noise * np.float32(2 * np.sqrt(np.pi) * max(sigma, 0.29)), np.float32)


def _white_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """Return uniform noise of mean 0 and variance 1, many times faster than normal noise."""
    levels = rng.integers(-128, 128, shape, np.int8)
    noise = levels.astype(np.float32)
    noise *= np.float32(1 / 73.9)
    return noise
