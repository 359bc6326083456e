"""The PyTorch half of the model: what training fits and export turns into graphs. The service never imports it."""
