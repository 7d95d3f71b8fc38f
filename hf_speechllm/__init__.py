"""Fine-tune speech LLMs (audio encoder, adaptor, causal LLM) on the Hugging Face stack."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .audio.fbank import FbankFeatureExtractor
from .model.configuration import AudioAdaptorConfig, SpeechLLMConfig
from .model.modeling import SpeechLLMForConditionalGeneration
from .model.processing import SpeechLLMProcessor

__version__ = "0.1.0"

AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig)
AutoModel.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
AutoModelForMultimodalLM.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
# Only for the models in this table, the Trainer of transformers shifts labels before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SpeechLLMConfig.model_type] = SpeechLLMForConditionalGeneration.__name__
AutoFeatureExtractor.register(SpeechLLMConfig, FbankFeatureExtractor)
AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor)

__all__ = [
    "AudioAdaptorConfig",
    "FbankFeatureExtractor",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
]
