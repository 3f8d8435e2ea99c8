"""Pre-training: from settings and images to a trained encoder."""
