"""Images and captions: scanning, buckets, order and the disk cache."""
