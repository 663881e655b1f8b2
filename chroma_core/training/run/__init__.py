"""One run of a job from its first step to its last file."""
