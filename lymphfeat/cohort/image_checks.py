"""Which images of a cohort can be used: found before long work begins.

`check_images` reads the header and the end of every file (13,000 JPEGs of 224 pixels: half a
second); `leave_out_unusable` decodes every image (four seconds).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.csv_rows import complain, name_some
from lymphfeat.cohort.images import ImageError, check_image, decode_crop
from lymphfeat.errors import CohortError
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.threads import map_in_order

_THREADS = 4  # decoding releases the interpreter's lock, reading waits for the disk
_SHOWN = 3


def check_images(paths: Sequence[Path], crop: int) -> None:
    """Refuse images whose file is evidently no whole image, or that are smaller than the crop.

    Damage in the middle of a file that keeps no checksums (JPEG does not) is not found. Raises
    CohortError that says what is wrong with the first, and names the others.
    """
    faults = _find_faults(paths, crop, check_image, silent)
    if faults:
        first, *others = faults.values()
        names = name_some([error.summary for error in others], "; ", _SHOWN)
        more = f" {len(others)} more cannot be used: {names}." if others else ""
        raise CohortError(f"{first}{more}")


def leave_out_unusable(cohort: Cohort, crop: int, *, progress: Progress = silent) -> Cohort:
    """Leave out the images that cannot be decoded or are smaller than the crop.

    They are in the `left_out` of the cohort returned, with a note for each. Raises CohortError for
    patients without any usable image, unless the cohort was loaded with `allow_missing`: they are
    then left out, too.

    >>> from lymphfeat.cohort.image_checks import leave_out_unusable
    >>> leave_out_unusable(lf.Cohort.load("cohort"), 112).left_out
    """
    paths = [path for own in cohort.images for path in own]
    faults = _find_faults(paths, crop, decode_crop, progress)
    lost = {
        f"{id} ({len(own)} images)": own[0]
        for id, own in zip(cohort.ids, cohort.images, strict=True)
        if faults.keys() >= set(own)
    }
    if lost and (len(lost) == len(cohort.ids) or not cohort.allow_missing):
        example = faults[next(iter(lost.values()))].summary
        complain(
            "patients without a usable image",
            list(lost),
            f"Such as {example}. Restore them, or leave out these patients, too, with "
            "--allow-missing.",
        )
    return cohort.without_images({path: error.summary for path, error in faults.items()})


def _find_faults(
    paths: Sequence[Path], crop: int, check: Callable[[Path, int], object], progress: Progress
) -> dict[Path, ImageError]:
    """Return what is wrong with the images that fail a check."""

    def fault(path: Path) -> ImageError | None:
        try:
            check(path, crop)
        except ImageError as error:
            return error
        return None

    found = {}
    errors = map_in_order(fault, paths, threads=_THREADS, name="check")
    for number, (path, error) in enumerate(zip(paths, errors, strict=True), 1):
        progress(number, len(paths))
        if error:
            found[path] = error
    return found
