"""Long simulations: at every size what the quick tests show at two."""

import pytest

from evidence.test_intervals import NOISES, SIZES, check_coverage, check_verdicts


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_intervals_cover_what_they_claim_and_no_verdict_is_wrong_more_often(n, noise):
    check_coverage(n, noise)
    check_verdicts(n, noise)
