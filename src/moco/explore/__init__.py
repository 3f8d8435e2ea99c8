"""A map of all images, in a browser or in one file."""
