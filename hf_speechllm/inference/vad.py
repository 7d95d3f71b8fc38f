"""Import path of voice activity detection in release 0.1; the module is `audio.vad`."""

from ..audio.vad import VoiceDetector

__all__ = ["VoiceDetector"]
