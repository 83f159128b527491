"""Models, losses, metrics, layers and optimizers. Nothing here knows of flags, strategies, files or logging."""
