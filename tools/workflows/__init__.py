"""The example workflows."""
