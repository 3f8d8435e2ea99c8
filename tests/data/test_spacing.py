import numpy as np
import pytest

from moco.data.spacing import evenly


@pytest.mark.parametrize("total, most", [(0, 5), (1, 5), (5, 5), (7, 5), (100, 10), (10**8 + 1, 5)])
def test_rows_are_spread_from_the_first_to_the_last(total, most):
    rows = evenly(total, most)
    assert len(rows) == min(total, most) and rows.dtype == np.int64
    if total <= most:
        assert rows.tolist() == list(range(total))
    else:
        assert rows[0] == 0 and rows[-1] == total - 1
        assert np.ptp(np.diff(rows)) <= 1
