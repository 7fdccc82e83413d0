"""The training loop: setup, optimizer, checkpoints, evaluation and logging."""
