"""What a model is trained for and measured by: one file a task, on the same model, loop and checkpoints."""
