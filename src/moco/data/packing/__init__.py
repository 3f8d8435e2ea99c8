"""Writing a set of images as tar shards."""
