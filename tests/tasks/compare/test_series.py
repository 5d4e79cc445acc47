"""The checkpoints of a folder: in the order of training, and all of them whole before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from peelwise.errors import ModelError
from peelwise.model.checkpoints import save_model
from peelwise.tasks.compare.series import checkpoint_folders
from zoo import ZOO

NAMES = ("final", "step-1000", "step-200", "step-90")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for name in NAMES:
        save_model(ZOO["llama"](), None, tmp_path / name)
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_checkpoints_come_in_the_order_of_their_numbers_the_final_one_last(run_folder: Path) -> None:
    assert [path.name for path in checkpoint_folders(run_folder)] == ["step-90", "step-200", "step-1000", "final"]


def test_one_that_was_written_by_half_is_told_before_the_work(run_folder: Path) -> None:
    weights = run_folder / "step-200" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"step-200.model\.safetensors"):
        checkpoint_folders(run_folder)


def test_fewer_than_two_are_no_run(tmp_path: Path) -> None:
    save_model(ZOO["llama"](), None, tmp_path / "step-1")
    with pytest.raises(ModelError, match="holds 1 checkpoints"):
        checkpoint_folders(tmp_path)
