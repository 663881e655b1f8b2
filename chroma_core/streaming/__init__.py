"""A transformer of which only a few blocks are on the device at a time; taking modules off it, streamed or not."""

from .streamer import BlockStreamer, away, module_bytes, stream_blocks, streamed, to_device, to_host

__all__ = ["BlockStreamer", "away", "module_bytes", "stream_blocks", "streamed", "to_device", "to_host"]
