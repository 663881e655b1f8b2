"""The embedded `tiny` model and the pictures of its world."""
