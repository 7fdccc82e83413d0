"""What a trained model is: encoders, fusion, heads, and how its weights are kept.  Imports nothing of training."""
