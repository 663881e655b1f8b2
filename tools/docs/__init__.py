"""Tables and pictures of the docs."""
