"""Checkpoints of other programs: which network a file holds, under which names, and where its tensors belong in ours.

Only tensors, numbers and strings are taken from a file: the network is found by the names and shapes of its tensors,
wherever in the file they are, and all of its tensors must be present.
"""

from moco.storage.foreign.content import QUERY_BACKBONE, QUERY_HEAD, Foreign, recognise

__all__ = ["QUERY_BACKBONE", "QUERY_HEAD", "Foreign", "recognise"]
