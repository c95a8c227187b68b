"""Files through a backbone: batches in order, on as many threads as there are."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lymphfeat.cohort.images import Crop, crop_decoder
from lymphfeat.errors import CohortError
from lymphfeat.features.pipeline import encode_files
from lymphfeat.runtime.devices import cpu_threads
from tests.cohorts import write_image

SIDE = 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(11):
        write_image(folder / f"{number:02d}.png", number, SIDE)
    return sorted(folder.iterdir())


def checksums(crops: Sequence[Crop]) -> list[int]:
    return [crop.crc32 for crop in crops]


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # where to decode: nothing is computed there
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_batches_come_in_order(paths: list[Path], device: str, threads: int, size: int) -> None:
    decode = crop_decoder(SIDE)
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    found = encode_files(batches, decode, checksums, device=torch.device(device), threads=threads)
    assert list(found) == [[decode(path).crc32 for path in batch] for batch in batches]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_comes_before_a_broken_file_is_encoded(paths: list[Path], device: str) -> None:
    batches = [paths[:2], [paths[2], paths[2].with_name("missing.png")], paths[3:]]
    found = encode_files(
        batches, crop_decoder(SIDE), checksums, device=torch.device(device), threads=2
    )
    assert len(next(found)) == 2
    with pytest.raises(CohortError, match=r"missing\.png: cannot be read"):
        next(found)


def test_nothing_of_nothing(paths: list[Path]) -> None:
    for device in ("cpu", "cuda"):
        found = encode_files(
            [], crop_decoder(SIDE), checksums, device=torch.device(device), threads=2
        )
        assert list(found) == []


def test_a_thread_computes_with_one_thread_and_gives_the_others_back(paths: list[Path]) -> None:
    before = torch.get_num_threads()
    with cpu_threads(2):
        found = encode_files(
            [paths],
            crop_decoder(SIDE),
            lambda crops: torch.get_num_threads(),
            device=torch.device("cpu"),
            threads=2,
        )
        assert list(found) == [1]
    assert torch.get_num_threads() == before
