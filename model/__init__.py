"""The multimodal VAE and everything that runs it, without training loops and HTTP.

- modality: descriptions of modalities, checks and batching of their arrays
- codec: JSON values and files <-> arrays
- bundle: the folder that holds an exported model
- runtime: a bundle in ONNX Runtime, without torch
- vae: the model in PyTorch, and its export to a bundle
"""

import os

# ONNX Runtime sends telemetry to Microsoft and waits for that at exit, unless this is set before its import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
