"""Kills by the dozen: what the quick tests show with a handful."""

import pytest

from api.test_monitor import check_killed_trainings
from store.test_store import check_killed_writers


@pytest.mark.parametrize("check", [check_killed_writers, check_killed_trainings])
def test_killing_at_random_moments_loses_at_most_the_record_being_written(check, tmp_path):
    check(tmp_path, 50)
