"""Everybody's checkpoints: which network lies in a file, under which names, and where its tensors belong in ours.

Nothing is taken from a file but tensors, numbers and texts: the network is found by the names and shapes of its
tensors, wherever in the file they lie, and every tensor of it has to be there.
"""

from moco.foreign.content import QUERY_BACKBONE, QUERY_HEAD, Foreign, recognise

__all__ = ["QUERY_BACKBONE", "QUERY_HEAD", "Foreign", "recognise"]
