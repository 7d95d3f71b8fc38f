"""Options of `TrainingArguments` with and without effect, and the options that replace the latter."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_SORTED = "batches always contain recordings of similar lengths, in random order; leave it out"
_METRICS = "validation computes loss, token accuracy and, with --eval_cer, error rates; leave it out"
# Option without effect: reason and alternative.
WITHOUT_EFFECT = {
    "per_device_train_batch_size": "batches are measured in audio seconds; use --per_device_train_batch_seconds",
    "per_device_eval_batch_size": "batches are measured in audio seconds; use --per_device_eval_batch_seconds",
    "auto_find_batch_size": "use --per_device_train_batch_seconds auto",
    "train_sampling_strategy": _SORTED,
    "group_by_length": _SORTED,
    "length_column_name": _SORTED,
    "label_smoothing_factor": "the loss has no label smoothing; leave it out",
    "do_train": "finetune always trains; leave it out",
    "do_eval": "use --validation_file and --eval_strategy",
    "do_predict": "decode recordings with `hf-speechllm decode` after training",
    "dataloader_drop_last": "every epoch uses all rows; leave it out",
    "dataloader_multiprocessing_context": "loader processes use the platform's default start method; leave it out",
    "dataloader_in_order": "batches always keep the order, so that a run can be resumed; leave it out",
    "remove_unused_columns": "the collator reads columns that the model does not; leave it out",
    "logging_nan_inf_filter": "non-finite steps are skipped and counted; see --max_bad_steps",
    "bf16_full_eval": "validation uses the precision of training; see --bf16",
    "fp16_full_eval": "validation uses the precision of training; see --bf16",
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": _METRICS,
    "use_cache": "training has no key-value cache; leave it out",
    "use_liger_kernel": "use --compile_layers true",
    "liger_kernel_config": "use --compile_layers true",
    "optim_target_modules": "choose what is trained with --freeze_audio_encoder, --freeze_llm, --use_lora, ...",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint; leave it out",
    "hub_always_push": "the finished model is pushed, checkpoints are not; see --push_to_hub",
}
# Options that work as in transformers, of all supported releases.
EFFECTIVE = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    average_tokens_across_devices bf16 data_seed dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm eval_delay eval_on_start
    eval_steps eval_strategy fp16 fsdp fsdp_config full_determinism gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token ignore_data_skip include_num_input_tokens_seen learning_rate
    load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
    neftune_noise_alpha num_train_epochs optim optim_args output_dir parallelism_config project push_to_hub
    report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id use_cpu warmup_steps weight_decay
    """.split()  # noqa: SIM905
)


def check_inherited_options(names: Iterable[str], own: Collection[str] = ()) -> None:
    """Refuses options without effect, and warns about unknown options.

    Args:
        names: names of the options that the user has set.
        own: names of the options that this project defines.

    Raises:
        ValueError: names the option and the alternative.
    """
    for name in names:
        if name in own:
            continue
        if name in WITHOUT_EFFECT:
            raise ValueError(f"--{name} has no effect here: {WITHOUT_EFFECT[name]}")
        if name not in EFFECTIVE:
            logger.warning("--%s is newer than this release of hf_speechllm and not tested", name)


def changed_without_effect(args: TrainingArguments) -> list[str]:
    """Returns the options without effect whose values differ from the defaults."""
    fields = {item.name: item for item in dataclasses.fields(args)}
    return [name for name in WITHOUT_EFFECT if name in fields and getattr(args, name) != _default(fields[name])]


def _default(item: dataclasses.Field) -> object:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
