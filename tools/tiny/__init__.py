"""The embedded `tiny` model and the images of its world."""
