"""What is kept on disk: the run folder, checkpoints and encoders, ours and those of other programs."""
