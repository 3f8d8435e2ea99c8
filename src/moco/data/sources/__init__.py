"""Sets of images by kind of source: a folder, a list, shards, an array file or a name."""
