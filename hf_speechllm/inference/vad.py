"""The import path of voice activity detection in release 0.1; it is in `audio.vad`."""

from ..audio.vad import VoiceDetector

__all__ = ["VoiceDetector"]
