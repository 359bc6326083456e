"""Trains models and exports bundles, offline. Imports ``model``, never ``service``.

``cli`` and ``commands``: the command line. ``trainable``: the interface of all models, implemented by ``concord`` and
``baselines``. ``fit`` and ``stages``: training. ``data``: rows and batches. ``evaluation``: figures of one model. ``reports``:
tables and charts.
"""
