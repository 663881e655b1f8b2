"""The words of the window in several languages."""
