"""Features of images: computing, storing, searching and arranging them."""

from moco.embeddings.coordinates import coordinates
from moco.embeddings.duplicates import duplicates, outliers
from moco.embeddings.embed import embed_to

__all__ = ["coordinates", "duplicates", "embed_to", "outliers"]
