"""The model in PyTorch, for training and export. The service does not import it."""
