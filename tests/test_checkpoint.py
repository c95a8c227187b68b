"""How often the state of a training is written."""

from pathlib import Path

from lymphfeat.cohort.provenance import NOBODY
from lymphfeat.runtime.checkpoint import Checkpoint


def test_written_at_once_then_by_time_and_always_at_the_end(tmp_path: Path) -> None:
    now = 1000.0
    path = tmp_path / "checkpoint.pt"
    checkpoint = Checkpoint(path, {}, NOBODY.to_json(), seconds=60, clock=lambda: now)

    def step_written(step: int, *, last: bool = False) -> int:
        checkpoint.write({"step": step}, last=last)
        state = checkpoint.read()
        assert state is not None
        return int(state["step"])

    assert step_written(1) == 1
    now += 59
    assert step_written(2) == 1
    now += 1
    assert step_written(3) == 3
    now += 30
    assert step_written(4) == 3
    assert step_written(5, last=True) == 5
    now += 59
    assert step_written(6) == 5
