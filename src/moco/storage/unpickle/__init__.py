"""Reading files of tensors from untrusted sources, without running any code in them.

`torch.load(weights_only=True)` refuses a file if it names a class that torch does not know, and the checkpoints of
other programs name many. Such files are read by a pickle interpreter that can only call a dozen constructors of tensors
and containers, written here; every other name is replaced by an inert object and never looked up.
"""

from moco.storage.unpickle.pickles import StandIn
from moco.storage.unpickle.reading import first_line, read, tensors_in

__all__ = ["StandIn", "first_line", "read", "tensors_in"]
