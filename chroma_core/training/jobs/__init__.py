"""Jobs as folders, the queue of them, and running one to its end."""
