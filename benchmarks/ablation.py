"""Measures training with one fast path off at a time; prints a JSON line for each run.

python benchmarks/ablation.py --batch_seconds 1000 --dataloader_num_workers 8
python benchmarks/ablation.py --size tiny --batch_seconds 60 --steps 4 --rows 200   # trial on a CPU

There are two base runs: `compiled` has all fast paths on, `eager` has all except compiled layers. Fast paths that
change the compiled code are turned off in `eager`, which needs no compilation. Fast paths without an option of the
trainer are replaced here.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import torch
from torch.nn import functional
from train_throughput import measure, read_options
from transformers import PreTrainedModel
from workload import environment, make_model, make_rows

from hf_speechllm.model import packing
from hf_speechllm.model.loss import UNSCALED

COMPILED = ["--compile_layers", "true"]
PADDED = ["--padding_free", "false"]
SMALL = ["--per_device_train_batch_seconds", "240"]


def loss_of_all_logits(hidden_states, labels, head, num_items_in_batch=None, positions=None, scaling=UNSCALED):
    """Computes `loss.supervised_loss` with logits at every position."""
    logits, targets = scaling(head(hidden_states[:, :-1]).float()).flatten(0, 1), labels[:, 1:].flatten()
    count = (targets != -100).sum()
    total = functional.cross_entropy(logits, targets, reduction="sum")
    correct = ((logits.argmax(-1) == targets) & (targets != -100)).sum()
    return total / num_items_in_batch, count, correct / count


def restore_masks(model) -> None:
    """Replaces `disable_host_syncs`: transformers makes the masks, also after other runs of the model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == packing.PADDED:
            module.set_attn_implementation("sdpa")


# By label: the base run, options of the trainer, and replaced objects.
WAYS: dict[str, tuple[str, list[str], dict]] = {
    "nothing": ("eager", [], {}),
    "leaving padding out": ("eager", PADDED, {}),
    "leaving padding out, memory block in one kernel": (
        "eager",
        PADDED,
        {"hf_speechllm.fast.fsmn.kernel_works": lambda: False},
    ),
    "leaving padding out, attention without cuDNN": (
        "eager",
        PADDED,
        {
            "hf_speechllm.training.speed.disable_host_syncs": restore_masks,
            "hf_speechllm.training.trainer.attention_context": lambda args: nullcontext(),
        },
    ),
    "leaving padding out, masks made without looking": (
        "eager",
        PADDED,
        {
            "hf_speechllm.training.speed.disable_host_syncs": restore_masks,
            "hf_speechllm.model.modeling.causal_masks": lambda config: None,
        },
    ),
    "inputs copied ahead": ("eager", ["--dataloader_pin_memory", "false"], {}),
    "label positions' logits only": ("eager", [], {"hf_speechllm.model.modeling.supervised_loss": loss_of_all_logits}),
    "loss in chunks of 4,096": ("eager", [], {"hf_speechllm.model.loss.POSITIONS_PER_CHUNK": 1 << 30}),
    "batches of like lengths": ("eager", [], {"hf_speechllm.data.sampler.BUCKET_RATIO": 1e9}),
    "large batches (240 s instead)": ("eager", SMALL, {}),
    "fused optimizer": ("eager", ["--optim", "adamw_torch"], {}),
    "loader processes": ("eager", ["--dataloader_num_workers", "0"], {}),
    "nothing, and layers compiled": ("compiled", [], {}),
    "leaving padding out, compiled": ("compiled", PADDED, {}),
    "batches of like lengths, compiled": ("compiled", [], {"hf_speechllm.data.sampler.BUCKET_RATIO": 1e9}),
    "large batches (240 s instead), compiled": ("compiled", SMALL, {}),
    "loader processes, compiled": ("compiled", ["--dataloader_num_workers", "0"], {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="fun_asr_nano", help="a model of recipes/configs/models")
    parser.add_argument("--mode", default="llm_only", help="a file of recipes/configs; :encoder caches its output")
    parser.add_argument("--batch_seconds", default="1000")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options, others = parser.parse_known_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = make_model(options.size, options.device)
    rows = make_rows(options.rows)
    for way in [way for way in WAYS if way in options.ways]:  # in this order: layers stay compiled
        base, changes, replaced = WAYS[way]
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            for name, value in replaced.items():
                stack.enter_context(patch(name, value))
            settings = [*others, *changes, *(COMPILED if base == "compiled" else [])]
            line = measure(read_options(options.mode, options, folder, settings), options, model, processor, rows)
        print(json.dumps({"off": way, "base": base, "mode": options.mode, **line, **environment()}), flush=True)


if __name__ == "__main__":
    main()
