"""Kill training at random moments and compare what becomes of it."""
