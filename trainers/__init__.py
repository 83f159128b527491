"""Training scripts and the rooms beside them: flags, input, the compiled loop, checkpoints, records."""
