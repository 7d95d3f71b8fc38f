"""Fine-tune a speech LLM.

# One GPU, only the LLM
hf-speechllm finetune llm_only --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf \\
    --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir exp/llm_only

# Eight GPUs, LoRA; --config_file names a configuration of accelerate
hf-speechllm finetune lora --num_processes 8 --config_file multi_gpu \\
    --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf --train_file data/train.jsonl --output_dir exp/lora

# The configuration that fits the amount of data and the machine; see `hf-speechllm plan --help`
hf-speechllm finetune --auto --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf \\
    --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir exp/auto

CONFIG is a YAML file, or the name of a file of the package: few_hours, lora, adaptor_only, ...
With a list `stages` in the file, one command runs several stages, each from the model of the previous one; see
docs/guides/stages.md.
Options of the command line override the file. The same command from a checkout is
`accelerate launch [--config_file FILE] recipes/finetune.py [CONFIG] ...`.
"""

import logging
import os
import sys
from typing import Any

from .arguments import AUTO, check_command_line, parse_arguments
from .exiting import skip_teardown
from .launch import launch, split_launch_options
from .parser import Parser, command_line, fail, prog, report
from .plan import apply_plan
from .stages import find_stages, run_stages

logger = logging.getLogger(__name__)

REQUIRED = ("output_dir",)  # the default of transformers would be a folder in the working directory


def main() -> None:
    """Runs the command; see the docstring of the module."""
    # Shapes differ between batches: expandable segments avoid fragmentation of the GPU memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    launch_options, argv = split_launch_options(command_line()[1])
    try:
        stages = find_stages(argv)
        if stages is not None and AUTO in argv:
            raise ValueError(f"{AUTO} plans a single run; leave it out for a configuration with stages")
    except ValueError as error:
        Parser(None).error(str(error))
    try:
        if stages is not None:
            run_stages(stages, check, lambda command: finetune(launch_options, command))
            return
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    finetune(launch_options, argv)


def check(argv: list[str], where: str = "") -> None:
    """Checks the options of a command line, and whether the data files exist.

    Args:
        argv: the command line.
        where: name of the stage, for errors of options.

    Raises:
        OSError, ValueError: if a file is missing, or a list of files is invalid.
        SystemExit: if an option is wrong.
    """
    from ..data.file_lists import expand_paths

    options = check_command_line(argv, where, REQUIRED)
    for files in (options.data.train_file, *([file] for file in options.validation_files.values())):
        expand_paths(files)


def finetune(launch_options: dict[str, Any], argv: list[str]) -> None:
    """Trains a model.

    Args:
        launch_options, argv: results of `split_launch_options`.
    """
    plans, argv = AUTO in argv, [word for word in argv if word != AUTO]
    if launch_options and not {"-h", "--help", "--help_all"} & {*argv}:
        try:
            check(argv)
            launch("finetune", launch_options, [*argv, AUTO] if plans else argv)
        except (OSError, ValueError) as error:
            sys.exit(f"{prog()}: error: {error}")
        return
    options = parse_arguments(argv, __doc__, required=REQUIRED)

    # Imported after parsing, so that errors of the command line appear immediately.
    from transformers import set_seed

    from ..audio.downloads import UrlPolicy
    from ..data.bad_rows import BadDataError
    from ..formats.checkpoint import CheckpointError
    from ..training.assembly import encode_rows, load_data, load_model
    from ..training.checkpointing.lineage import RunFinished
    from ..training.checkpointing.selection import RetentionError
    from ..training.checkpointing.verification import VerificationError
    from ..training.checkpointing.writer import SaveError
    from ..training.errors import FaultError, Preempted
    from ..training.freezing import count_parameters
    from ..training.parameter_groups import learning_rate
    from ..training.preemption import EXIT_STATUS
    from ..training.run import describe_data, find_checkpoint, save_final, set_up_logging
    from ..training.trainer import SpeechLLMTrainer

    set_up_logging(options.training)
    if options.training.device.type == "cpu" and not options.training.use_cpu:
        logger.warning("no GPU was found: training uses the CPU; --use_cpu hides this warning")
    if plans:
        try:
            options = apply_plan(options, argv)
        except ValueError as error:
            fail(f"{prog()}: error: {error}")
    data, args = options.data, options.training
    set_seed(args.seed)

    # Data first: errors in the data are found before the model is loaded.
    try:
        UrlPolicy.change(data.url_max_megabytes, data.url_timeout_seconds, data.allow_private_redirects)
        checkpoint = find_checkpoint(args)
        loaded = load_data(options)
    except (BadDataError, OSError, ValueError) as error:
        fail(f"{prog()}: error: {error}")
    except RunFinished as end:
        logger.info("%s", end)
        args.distributed_state.destroy_process_group()
        return
    describe_data(loaded.train_rows, loaded.validation_rows)

    try:
        model = load_model(options, loaded)
        loaded.train_rows = encode_rows(loaded.train_rows, model, loaded.processor, options)
        for part, (trained, total) in count_parameters(model).items():
            rate = f"trained with learning rate {learning_rate(args, part):g}" if trained else "frozen"
            share = f"{trained / 1e6:.2f} M of " if 0 < trained < total else ""
            logger.info("%s: %s%.2f M parameters, %s", part, share, total / 1e6, rate)

        trainer = SpeechLLMTrainer(model=model, args=args, **loaded.for_trainer())
        trainer.get_optimizer_cls_and_kwargs(args, model)  # --optim may need a package
    except ModuleNotFoundError:
        raise  # `main` reports this error
    except (ImportError, OSError, ValueError) as error:
        fail(f"{prog()}: error: {' '.join(str(error).split())}")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except Preempted as end:
        report(f"{prog()}: {end}")
        _end_training(trainer, EXIT_STATUS)
        sys.exit(EXIT_STATUS)
    except (RetentionError, SaveError, VerificationError) as error:  # raised on all ranks
        trainer.accelerator.end_training()
        fail(f"{prog()}: {error}")
    except (BadDataError, FaultError, CheckpointError) as error:
        fail(f"{prog()}: {error}")
    save_final(trainer, result, options.validation_files)
    if args.push_to_hub:
        try:
            trainer.push_to_hub()
        except (OSError, ValueError, RuntimeError) as error:
            again = f"hf-speechllm push --input {args.output_dir} --hub_model_id {trainer.hub_model_id}"
            fail(f"{prog()}: error: {error}; the model is saved in {args.output_dir}; to publish the model: {again}")
    _end_training(trainer)


def _end_training(trainer: Any, status: int = 0) -> None:
    """Leaves the process group; otherwise its threads can abort the process at the end of the interpreter."""
    trainer.accelerator.end_training()
    if trainer.args.world_size > 1:
        skip_teardown(status)
