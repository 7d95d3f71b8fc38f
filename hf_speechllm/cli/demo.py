"""Open a page in the browser to try a model: microphone or file, language, hotwords, times, subtitles.

hf-speechllm demo --model_name_or_path exp/lora
hf-speechllm demo --model_name_or_path exp/lora --base_model FunAudioLLM/Fun-ASR-Nano-2512-hf   (both, side by side)

Only this machine reaches the page, unless --host or --share is used. Recordings are deleted when the command ends.
Requires the extra [demo].
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from ..console import show_log
from .parser import Parser, prog


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="model or LoRA folder, or Hub id")
    parser.add_argument("--base_model", help="second model, whose results are shown beside those of the first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks")
    parser.add_argument("--port", type=int, help="port (default: the first free port from 7860)")
    parser.add_argument("--share", action="store_true", help="also create a public address, through Gradio's servers")
    parser.add_argument("--max_seconds", type=float, default=600.0, help="duration of a recording, at most")
    parser.add_argument("--max_megabytes", type=float, default=100.0, help="size of a file, at most")
    parser.add_argument("--device", help="device (default: GPU, otherwise the CPU)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="dtype (default: bfloat16 on a GPU)")
    args = parser.parse_args()
    for name in ("max_seconds", "max_megabytes"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if args.port is not None and not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: not a port; choose a number from 0 to 65535")
    show_log()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # otherwise recordings would stay

    with tempfile.TemporaryDirectory(prefix="hf_speechllm-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads, read at the import of gradio
        from .demo_page import build_page, load_transcriber, serve

        names = {"": args.model_name_or_path}
        if args.base_model:
            names = {"Tuned model: ": args.model_name_or_path, "Base model: ": args.base_model}
        try:
            models = {
                title + shown(name): load_transcriber(name, args.device, args.dtype) for title, name in names.items()
            }
            page = build_page(models, args.max_seconds, folder)
            address = serve(page, args.host, args.port, args.share, args.max_megabytes)
        except (OSError, ValueError) as error:
            sys.exit(f"{prog()}: error: {' '.join(str(error).split())}")
        print(f"The page is open at {address} (Ctrl-C ends the command)", flush=True)
        page.block_thread()


def shown(name: str) -> str:
    """Returns the name of a model for visitors of the page: a Hub id, or a folder without the path to the folder."""
    return Path(name).resolve().name if Path(name).exists() else name
