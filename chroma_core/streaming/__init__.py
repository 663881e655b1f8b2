"""Running a transformer of which only a few blocks are on the device at a time."""

from .streamer import BlockStreamer, stream_blocks, streamed

__all__ = ["BlockStreamer", "stream_blocks", "streamed"]
