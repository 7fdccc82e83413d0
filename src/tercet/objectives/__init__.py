"""How the model learns: pure functions of features, one file a loss, and the small state that they read."""
