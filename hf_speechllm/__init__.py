"""Fine-tune speech LLMs (audio encoder, adaptor, causal LLM) on the Hugging Face stack."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from .audio.fbank import FbankFeatureExtractor
from .model.configuration import AudioAdaptorConfig, SpeechLLMConfig
from .model.modeling import SpeechLLMForConditionalGeneration
from .model.processing import SpeechLLMProcessor

__version__ = "0.1.0"

AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig)
AutoModel.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
AutoModelForMultimodalLM.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
AutoFeatureExtractor.register(SpeechLLMConfig, FbankFeatureExtractor)
AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor)

__all__ = [
    "AudioAdaptorConfig",
    "FbankFeatureExtractor",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
]
