"""A trained model for programs without Tercet: ONNX graphs and `torch.export` programs of its encoders."""
