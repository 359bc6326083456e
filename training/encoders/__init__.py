"""Frozen encoders in training: where they come from, and the features that they compute.

``find`` turns the ``encoder`` of a configuration into files: an ONNX graph, a tokenizer, a description. ``features`` runs them
on the rows, once, and keeps the results on disk.
"""
