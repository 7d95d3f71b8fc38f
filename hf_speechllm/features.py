"""The import path of the feature extractor in release 0.1, which cached features name; it is in `audio.fbank`."""

from .audio.fbank import FbankFeatureExtractor

__all__ = ["FbankFeatureExtractor"]
