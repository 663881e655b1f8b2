"""Inference requests: one JSON value that says what to paint, for the command line and for the host."""
