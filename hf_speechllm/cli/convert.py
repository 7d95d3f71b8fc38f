"""Convert a checkpoint between the formats of this project, transformers and FunASR; tensors are copied exactly.

# From FunASR to the format of this project
hf-speechllm convert --input FunAudioLLM/Fun-ASR-Nano-2512 --output exp/nano --format speech_llm

# A fine-tuned model or a LoRA run (adapters are merged) to FunASR
hf-speechllm convert --input exp/lora --output exp/lora_funasr --format funasr

The format of the input is detected. `native` is the format of the `fun_asr_nano` class in transformers. Conversion to
`native` is refused without --force if the model would behave differently in transformers.
"""

import logging
import sys
from pathlib import Path

from ..console import command, print_summary, quiet_transformers, show_log
from .parser import Parser, prog

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="folder or Hub id, in any format")
    parser.add_argument("--output", required=True, help="folder for the result; must not exist")
    parser.add_argument(
        "--format", required=True, choices=["speech_llm", "native", "funasr"], help="format of the result"
    )
    parser.add_argument("--force", action="store_true", help="convert even if the model would behave differently")
    parser.add_argument("--max_shard_size", default="50GB", help="size of safetensors files, at most")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    args = parser.parse_args()
    if Path(args.output).exists():
        parser.file_error(f"{args.output} exists; remove it or choose another --output")
    show_log()
    quiet_transformers()

    from .. import SpeechLLMProcessor
    from ..formats.loading import read_checkpoint
    from ..formats.saving import write_checkpoint

    try:
        checkpoint = read_checkpoint(args.input, revision=args.revision)
        processor = SpeechLLMProcessor.from_pretrained(args.input, revision=args.revision)
        write_checkpoint(checkpoint, processor, args.output, args.format, args.force, args.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    recording = command("decode", "RECORDING", model_name_or_path=args.output, output_file="texts.txt")
    print_summary({"written": f"{args.output}: {len(checkpoint.tensors)} tensors, format {args.format}"}, [recording])
