"""Two processes learn what one learns from batches of twice the size."""

import pytest

from mend.tests.training.test_checkpoint import experiment, forks


@forks
@pytest.mark.slow
def test_two_processes_are_one_with_the_batch_doubled(tmp_path):
    found = experiment("pair", tmp_path)
    assert found["statuses"] == [0] * 6, found
    assert found["stopped"] == [7], "both stop after the step in which one of them was told to"
    assert found["ranks_alike"]
    # The mean over 8 samples is a mean of 2 x 2 means of 2 instead of 2 means of 4: float32 sums in another order, off by about 1e-7 each.
    # Adam divides by the size of the gradient; 20 steps of 1e-2 stay within 1e-6 for all but gradients near 0.
    assert found["apart"] < 1e-6 and found["losses_apart"] < 1e-5, found
    assert found["folder_alike"] and found["folders"] == ["run"], "how samples are spread over processes makes no other run"
