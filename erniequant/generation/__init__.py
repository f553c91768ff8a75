"""Text from a loaded model: the continuation of a prompt, and a chat that remembers."""

from erniequant.generation.chat import Answer, ChatSession
from erniequant.generation.continuation import Generation, generate
from erniequant.generation.sampling import Sampling

__all__ = ["Answer", "ChatSession", "Generation", "Sampling", "generate"]
