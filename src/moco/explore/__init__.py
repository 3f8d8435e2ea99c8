"""A page to look at: a map of all images, and a report of a run."""
