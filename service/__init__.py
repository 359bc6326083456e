"""Serves bundles over HTTP. Never imports torch or the training package.

``api`` HTTP routes, parsing and responses; ``http`` server, admission, keys; ``inference`` models, queue and scheduler;
``telemetry`` metrics, logs, traces; ``batch`` data sets; ``client`` installed as ``concord.client``; ``page`` the browser page.
"""
