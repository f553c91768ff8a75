"""Reading and writing folders of safetensors shards."""

from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.checkpoint.writer import CheckpointWriter, WrittenCheckpoint

__all__ = ["Checkpoint", "CheckpointWriter", "WrittenCheckpoint", "open_checkpoint"]
