"""The speech LLM: an audio encoder, an adaptor and a causal LLM, composed into one `PreTrainedModel`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from ..files import apply_umask
from . import pretrained
from .adaptors import AudioAdaptor
from .audio_lengths import LOW_FRAME_RATE
from .configuration import SpeechLLMConfig
from .ctc import CTCHead
from .encoders import build_encoder, encode, encoder_family, freeze_unused
from .gradient_checkpointing import enable_frozen_checkpointing, require_gradient
from .kv_cache import CACHE, CACHE_NAMES, find_cache
from .loss import LogitScaling, count_labels, supervised_loss
from .native_families import ALL_PARTS
from .native_families import PARTS as PARTS
from .packing import PaddingFreeBatch, Positions, causal_masks, packed_masks, padding_mask, require_padding_free


@dataclass
class SpeechLLMOutput(CausalLMOutputWithPast):
    """Output of the model: fields of transformers' causal LLMs, and two numbers about the labels.

    Args:
        loss: scalar, cross-entropy over the supervised tokens; with labels only.
        logits: shape = (batch, tokens, vocabulary); without labels, or with `return_logits`.
        cache: the LLM's key-value cache; `past_key_values` in transformers before 5.24.
        hidden_states: with `output_hidden_states`, the LLM's input and the output of each LLM layer, each of shape =
            (batch, tokens, width). Excludes states of the audio encoder and the adaptor.
        attentions: with `output_attentions`, one tensor per LLM layer, shape = (batch, heads, tokens, tokens).
        num_label_tokens: scalar integer, number of supervised tokens; with labels only.
        token_accuracy: scalar, share of supervised tokens predicted correctly (teacher forcing); with labels only.
        ctc_loss: scalar, loss of the CTC head before weighting; with `ctc_targets` only.
    """

    num_label_tokens: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None


class SpeechLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A causal LLM that receives audio tokens at the positions of `config.audio_token_id` in `input_ids`.

    Example:

    ```python
    >>> from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

    >>> model = SpeechLLMForConditionalGeneration.from_pretrained("FunAudioLLM/Fun-ASR-Nano-2512-hf")
    >>> processor = SpeechLLMProcessor.from_pretrained("FunAudioLLM/Fun-ASR-Nano-2512-hf")
    >>> inputs = processor.apply_transcription_request("recording.wav", language="zh")
    >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=200), skip_special_tokens=True)
    ```
    """

    config_class = SpeechLLMConfig
    config: SpeechLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`, the supervised tokens of the whole step

    def __init__(self, config: SpeechLLMConfig):
        super().__init__(config)
        self.audio_encoder = build_encoder(config.audio_encoder_config)
        self.audio_adaptor = AudioAdaptor._from_config(config.audio_adaptor_config)
        self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        self.logit_scaling = LogitScaling.of(config.llm_config)
        self.ctc_head: Any = CTCHead._from_config(config.ctc_head_config) if config.ctc_head_config else None
        # The token file of FunASR's CTC branch, and its tensors if they are incomplete: the model does not use them.
        self.ctc_tensors: dict[str, torch.Tensor] = {}
        self.audio_token_dropout = 0.0  # share of audio tokens that training replaces by zeros
        self.post_init()
        # Units that FSDP gathers: layers of the LLM, and encoder and adaptor as a whole, because one gather per small
        # layer makes the host the bottleneck. FSDP fails on the name of a class that the model does not contain.
        names = {type(module).__name__ for module in self.llm.modules()}
        parts = (self.audio_encoder, self.audio_adaptor, self.ctc_head)
        wholes = {type(part).__name__ for part in parts if part is not None}
        self._no_split_modules = wholes | (set(self.llm._no_split_modules or ()) & names)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Returns false: transformers leaves buffers of the LLM uninitialized in custom code."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a model from a folder or the Hub; the options are those of transformers.

        Args:
            pretrained_model_name_or_path: folder or Hub id in the layout of this package, transformers'
                `fun_asr_nano` or FunASR (`model.pt`, `config.yaml`), or a peft adapter, which is merged into the base
                model.
            dtype: default: the stored dtype of each part.

        Raises:
            CheckpointError: if tensors are missing, unexpected or of a wrong shape, or a file is damaged.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        return pretrained.formats().load_model(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """Saves model, config and generation config in the layout of this package; options as in transformers."""
        if state_dict := kwargs.get("state_dict"):
            # Tied weights that DeepSpeed or FSDP gathered share no memory and would be saved twice.
            kwargs["state_dict"] = {
                name: tensor
                for name, tensor in state_dict.items()
                if self.all_tied_weights_keys.get(name) not in state_dict
            }
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            loading = pretrained.formats()
            loading.write_ctc_tensors(self.ctc_tensors, Path(save_directory) / loading.CTC_FILE)
            apply_umask(save_directory)

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, token: str | bool | None = None, **kwargs):
        """Uploads the model with a model card. In contrast to transformers, a new repository is private by default.

        The upload uses the layout of transformers' `fun_asr_nano` if that class computes the same results. Otherwise
        it uses the layout of this package and includes the package's code. After an interruption, call this again.

        Args:
            repo_id: `USER/MODEL`; created if missing.
            private: visibility of a new repository; `None`: default of the account.
            token: default: the token of `hf auth login`.
            **kwargs: `max_shard_size`, and options of `HfApi.upload_folder` (`commit_message`, `revision`, ...).

        Returns:
            The commit, as returned by `HfApi.upload_folder`.
        """
        return pretrained.hub().push_model(self, repo_id, private, token, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the LLM's token embeddings."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's token embeddings."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the LLM's head."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's head."""
        self.llm.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """Returns the LLM without the head."""
        return self.llm.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replaces the LLM except the head."""
        self.llm.set_decoder(decoder)

    def train(self, mode: bool = True) -> SpeechLLMForConditionalGeneration:
        """Sets the training mode. Completely frozen parts stay in eval mode, without dropout."""
        super().train(mode)
        freeze_unused(self.audio_encoder, self.config.audio_encoder_config)
        for part in filter(None, (getattr(self, name) for name in ALL_PARTS)):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
                if mode:
                    enable_frozen_checkpointing(part)
        return self

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor,
        frame_positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the encoder.

        Args:
            input_features: shape = (recordings, feature frames, feature size).
            input_features_mask: shape = (recordings, feature frames), 0 for padding.
            frame_positions: see `frames` in `packing.Positions`.

        Returns:
            Encoder states, shape = (recordings, encoder frames, encoder width), and their mask, shape = (recordings,
            encoder frames).
        """
        input_features = require_gradient(input_features, self.audio_encoder)
        config = self.config.audio_encoder_config
        return encode(self.audio_encoder, config, input_features, input_features_mask, frame_positions)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes recordings into audio tokens.

        Args:
            input_features: shape = (recordings, feature frames, feature size).
            input_features_mask: shape = (recordings, feature frames), 0 for padding.

        Returns:
            Audio tokens, shape = (recordings, tokens, LLM width), and the number of audio tokens of each recording,
            shape = (recordings,).
        """
        return self._audio_tokens(input_features, input_features_mask)

    def embed(self, input_ids: torch.Tensor, encoder_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the input of the LLM: embeddings, with audio tokens in the place of placeholders.

        Args:
            input_ids: shape = (batch, tokens).
            encoder_states, mask: of all recordings, from `encode_audio`.

        Returns:
            Shape = (batch, tokens, LLM width).
        """
        audio = self._audio_tokens(None, mask, encoder_states)
        return self._insert_audio(input_ids, self.get_input_embeddings()(input_ids), *audio)

    def _audio_tokens(self, features, mask, states=None, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
        if states is None:
            states, mask = self.encode_audio(features, mask, positions)
        if not encoder_family(self.config.audio_encoder_config).packs:
            positions = None  # positions of feature frames do not apply to a shorter encoder output
        if positions is not None:
            require_padding_free(self.audio_adaptor.config)
        tokens, lengths = self.audio_adaptor(require_gradient(states, self.audio_adaptor), mask, positions)
        if self.config.use_low_frame_rate:
            lengths = (lengths + LOW_FRAME_RATE - 1) // LOW_FRAME_RATE
            tokens = tokens[:, : -(-tokens.shape[1] // LOW_FRAME_RATE)]
        return tokens, lengths

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_logits: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        encoder_states: torch.Tensor | None = None,
        audio_tokens: torch.Tensor | None = None,
        positions: Positions | None = None,
        past_key_values: Cache | None = None,
        ctc_targets: torch.Tensor | None = None,
        ctc_target_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> SpeechLLMOutput:
        """Runs the model. With labels, computes logits only at supervised positions.

        Args:
            input_ids: shape = (batch, tokens), with one `config.audio_token_id` for each audio token.
            attention_mask: shape = (batch, tokens), 0 for padding.
            input_features: shape = (recordings, feature frames, feature size); recordings in the order of their
                placeholders, row by row.
            input_features_mask: shape = (recordings, feature frames), 0 for padding.
            labels: shape = (batch, tokens), -100 for tokens that are not supervised.
            cache, past_key_values: the LLM's key-value cache, under either name.
            return_logits: whether to return all logits if labels are given.
            logits_to_keep: without labels, number of last positions that get logits (0: all).
            num_items_in_batch: supervised tokens of the whole optimizer step, the divisor of the summed loss.
            encoder_states: replaces `input_features`: states from `encode_audio`; `input_features_mask` must then be
                the mask from `encode_audio`.
            audio_tokens: replaces `input_features`: audio tokens of all recordings, shape = (tokens, width).
            positions: optional, for speed; computed by `SpeechLLMCollator`.
            ctc_targets, ctc_target_lengths: labels of the CTC head, whose loss is added; see `CTCHead.loss`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, `shift_labels` and other arguments of
                transformers' LLMs.

        Raises:
            ValueError: if the numbers of placeholders and audio tokens differ, the attention implementation does not
                support padding-free batches, or the cache is given under both names.
        """
        cache = find_cache({"cache": cache, "past_key_values": past_key_values})
        positions, shift_labels = positions or {}, kwargs.pop("shift_labels", None)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        use_cache = getattr(self.config, "use_cache", None) if use_cache is None else use_cache
        ctc_loss = None
        if ctc_targets is not None and labels is not None:
            if encoder_states is None and input_features is not None and input_features_mask is not None:
                encoder_states, input_features_mask = self.encode_audio(
                    input_features, input_features_mask, positions.get("frames")
                )
            items = count_labels(labels, positions) if num_items_in_batch is None else num_items_in_batch
            ctc_loss = self.ctc_head.loss(encoder_states, input_features_mask, ctc_targets, ctc_target_lengths, items)
            if self.ctc_head.trained_alone:
                return SpeechLLMOutput(loss=ctc_loss, num_label_tokens=count_labels(labels, positions))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if audio_tokens is not None:
                lengths = torch.full((1,), len(audio_tokens), device=input_ids.device)
                inputs_embeds = self._insert_audio(input_ids, inputs_embeds, audio_tokens.unsqueeze(0), lengths)
            elif input_features is not None or encoder_states is not None:
                audio = self._audio_tokens(
                    input_features, input_features_mask, encoder_states, positions.get("frames")
                )
                inputs_embeds = self._insert_audio(input_ids, inputs_embeds, *audio)
        # Label positions require padding on the right, which the causal mask alone hides.
        causal = labels is not None and "labels" in positions
        llm = self.llm.config
        packing, masks = None, causal_masks(llm) if causal else padding_mask(llm, attention_mask, inputs_embeds)
        if causal and "tokens" in positions and attention_mask is not None:
            require_padding_free(self.llm.config)
            packing = PaddingFreeBatch(attention_mask, positions["tokens"])
            inputs_embeds, position_ids = packing.unpad(inputs_embeds), packing.position_ids
            kwargs.update(packing.attention)
            masks = packed_masks(self.llm.config, inputs_embeds.device)
        outputs = self.llm.get_decoder()(
            inputs_embeds=require_gradient(inputs_embeds, self.llm),
            attention_mask=masks,
            position_ids=position_ids,
            use_cache=use_cache if labels is None else False,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        states, all_states = outputs.last_hidden_state, outputs.hidden_states
        if packing is not None:
            states = packing.pad(states)
            all_states = all_states and tuple(packing.pad(layer) for layer in all_states)
        result: dict[str, Any] = {"hidden_states": all_states, "attentions": getattr(outputs, "attentions", None)}
        head = self.get_output_embeddings()
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result |= {"logits": self.logit_scaling(head(states[:, kept])), CACHE: getattr(outputs, CACHE)}
        elif shift_labels is not None or self.loss_function is not ForCausalLMLoss:  # set by the user
            result["logits"] = self.logit_scaling(head(states))
            result["loss"] = self.loss_function(
                logits=result["logits"], labels=labels, vocab_size=self.config.get_text_config().vocab_size,
                num_items_in_batch=num_items_in_batch, shift_labels=shift_labels,
            )  # fmt: skip
        else:
            result["loss"], result["num_label_tokens"], result["token_accuracy"] = supervised_loss(
                states, labels, head, num_items_in_batch, positions.get("labels"), self.logit_scaling
            )
            result["logits"] = self.logit_scaling(head(states)) if return_logits else None
        if ctc_loss is not None:
            result["loss"], result["ctc_loss"] = result["loss"] + self.ctc_head.loss_weight * ctc_loss, ctc_loss
        return SpeechLLMOutput(**result)

    def _insert_audio(self, input_ids, inputs_embeds, tokens, lengths) -> torch.Tensor:
        placeholders = input_ids == self.config.audio_token_id
        # Checked on the CPU only: on a GPU the comparison would be a host-device sync in every step.
        checked = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and int(placeholders.sum()) != int(lengths.sum()):
            raise ValueError(
                f"input_ids contain {int(placeholders.sum())} audio placeholders (id {self.config.audio_token_id}), "
                f"but the recordings have {int(lengths.sum())} audio tokens; build both with the same processor"
            )
        # The n-th placeholder receives the n-th audio token. The index lookup avoids boolean indexing, whose result
        # size requires a host-device sync.
        ends = lengths.cumsum(0)
        order = placeholders.flatten().cumsum(0) - 1
        recording = torch.searchsorted(ends, order, right=True).clamp(max=len(lengths) - 1)
        index = recording * tokens.shape[1] + order - (ends - lengths)[recording]
        audio = tokens.flatten(0, 1)[index.clamp(0, tokens.shape[0] * tokens.shape[1] - 1)]
        audio = audio.view(*placeholders.shape, -1).to(inputs_embeds.dtype)
        if self.training and self.audio_token_dropout:
            kept = torch.rand(placeholders.shape, device=audio.device) >= self.audio_token_dropout
            audio = audio * kept.unsqueeze(-1)
        return torch.where(placeholders.unsqueeze(-1), audio, inputs_embeds)


AutoModel.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
AutoModelForMultimodalLM.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
# transformers' Trainer shifts labels before label smoothing only for models in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SpeechLLMConfig.model_type] = SpeechLLMForConditionalGeneration.__name__
