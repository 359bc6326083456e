"""What a model is. No loops over data, no HTTP."""

import os

# ONNX Runtime sends telemetry to its makers, and waits for that when it ends, unless this is set before it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
