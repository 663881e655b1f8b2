"""A transformer of which only a few blocks are on the device at a time; taking modules off it, streamed or not."""

from .parking import HOST_MEMORY_MARGIN, away, to_device, to_host
from .streamer import BlockStreamer, module_bytes, stream_blocks, streamed

__all__ = [
    "HOST_MEMORY_MARGIN",
    "BlockStreamer",
    "away",
    "module_bytes",
    "stream_blocks",
    "streamed",
    "to_device",
    "to_host",
]
