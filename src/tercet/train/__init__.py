"""The training loop and what it stands on: optimizer, devices, checkpoints and tracking."""
