"""Import path of the feature extractor in release 0.1, used in fingerprints of caches; now in `audio.fbank`."""

from .audio.fbank import FbankFeatureExtractor

__all__ = ["FbankFeatureExtractor"]
