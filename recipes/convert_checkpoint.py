"""Convert a checkpoint between the layouts of this project, of transformers and of FunASR; no value changes.

# From FunASR to ours
python recipes/convert_checkpoint.py --input FunAudioLLM/Fun-ASR-Nano-2512 --output exp/nano --format speech_llm

# A fine-tuned model, or a LoRA run (which is merged), back to FunASR
python recipes/convert_checkpoint.py --input exp/lora --output exp/lora_funasr --format funasr

The layout of the input is recognised by itself. `native` is that of transformers' own `fun_asr_nano` class; it is
refused, unless forced, where the model would behave differently there.
"""

import argparse
import logging
import sys
from pathlib import Path

logger = logging.getLogger("convert_checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder or Hub id, in any layout")
    parser.add_argument("--output", required=True, help="folder for the result; must not exist")
    parser.add_argument(
        "--format", required=True, choices=["speech_llm", "native", "funasr"], help="layout of the result"
    )
    parser.add_argument("--force", action="store_true", help="write also what would behave differently there")
    parser.add_argument("--max_shard_size", default="50GB", help="safetensors larger than this are split")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    args = parser.parse_args()
    if Path(args.output).exists():
        parser.error(f"{args.output} exists; remove it or choose another --output")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from hf_speechllm import SpeechLLMProcessor
    from hf_speechllm.formats.loading import read_checkpoint, write_checkpoint

    try:
        checkpoint = read_checkpoint(args.input, revision=args.revision)
        processor = SpeechLLMProcessor.from_pretrained(args.input, revision=args.revision)
        write_checkpoint(checkpoint, processor, args.output, args.format, args.force, args.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"convert_checkpoint.py: error: {error}")
    logger.info("%s: %d tensors, layout %s", args.output, len(checkpoint.tensors), args.format)


if __name__ == "__main__":
    main()
