"""The model itself: transformer, latents, images, flavours, precisions and devices."""
