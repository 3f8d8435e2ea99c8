"""Reads files of tensors that anybody may have written, and runs nothing that they say.

`torch.load(weights_only=True)` refuses a file as soon as it names a class that torch does not know, and the checkpoints
of other programs name many. Those files are read by an interpreter of pickles that can call a dozen makers of tensors
and containers, written here, and nothing else: for every other name an inert object stands in, which nothing looks up.
"""

from moco.unpickle.files import first_line, read, tensors_in
from moco.unpickle.pickles import StandIn

__all__ = ["StandIn", "first_line", "read", "tensors_in"]
