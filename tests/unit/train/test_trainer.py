"""Window sums of the training loop."""

import torch

from embedtrain.train.task import Objective
from embedtrain.train.trainer import _Window


def test_a_resumed_window_keeps_its_sums_while_a_stream_brings_no_batch():
    window = _Window((1.0, 2.0, 3.0, 4.0, 5.0), seconds=1.0)
    window.close(window.local)  # no step yet: nobody knows that the model gives two sums of its own
    assert window.open_sums()[0] == (1.0, 2.0, 3.0, 4.0, 5.0)
    window.add(Objective(torch.tensor(1.0), torch.tensor(1.0), 1, torch.tensor([10.0, 20.0])), num_examples=1)
    window.close(window.local)
    assert window.report()[0].tolist() == [2.0, 3.0, 4.0, 14.0, 25.0]
