"""Trains a speech LLM from parts that never met, and measures what each choice gives; writes JSON lines.

    python benchmarks/composed_model.py exp/composed --audio_encoder WHISPER --llm SMOLLM2.gguf \\
        --real DATA/kathleen_en/train --recordings DATA/dialogue --word_list words.txt \\
        --test DATA/kathleen_en/test DATA/librispeech_tiny --seconds 1500

1. Samples sentences from the LLM; engines that are installed speak them, and random words of the list (eSpeak NG,
   MBROLA, Pico, flite, RHVoice).
2. Trains on all synthetic speech, the recordings of other speakers (`game_dialogue.py`) and the real speech, then on
   real speech (`composed_en.yaml`), once per seed.
3. Trains each variant of `VARIANTS` on the first set of synthetic speech.

Each result is scored on every test set, and on a twentieth of the real training recordings, which is held out. Runs
share the GPUs, `--runs_per_gpu` at a time. An interrupted command continues with what is missing. `--tiny` runs
everything with a tiny random model in minutes, on a CPU too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
import yaml

PROMPT = "Transcribe:"
# Beginnings that make the LLM write prose, and not only the texts of an encyclopaedia.
BEGINNINGS = [
    "",
    "CHAPTER II.\n\n",
    '"I don\'t know," he said. "',
    "She looked at him for a moment. ",
    "Dear friend,\n\n",
]
ENGINES = {"espeak": 0.25, "mbrola": 0.25, "pico": 0.2, "flite": 0.1, "rhvoice": 0.2}
SPEEDS = ["--speed_prob", "0.6", "--speed_factors", "0.85", "0.9", "0.95", "1.05", "1.1", "1.15"]
NOISE = [*["--noise_prob", "0.4", "--gain_prob", "0.3", "--reverb_prob", "0.2", "--telephone_prob", "0.05"], *SPEEDS]
SHUFFLED, RANDOM, REPLACED = ["--shuffled_words", "0.05"], ["--random_words", "0.35"], ["--replaced_words", "0.15"]
# Options of `synthesize` by set: the first set, and the same without one of its properties.
SETS = {
    "first": [NOISE, SHUFFLED, RANDOM, REPLACED],
    "rule": [NOISE, SHUFFLED, RANDOM, REPLACED],  # rule-based voices only
    "sampled": [NOISE, SHUFFLED],
    "whole": [NOISE, SHUFFLED, RANDOM],
    "clean": [SHUFFLED, RANDOM, REPLACED],
}
ADAPTORS = {
    "60ms": {"adaptor_type": "linear", "downsample_rate": 3},
    "40ms": {"adaptor_type": "linear", "downsample_rate": 2},
    "100ms": {"adaptor_type": "linear", "downsample_rate": 5},
    "transformer": {"adaptor_type": "transformer", "downsample_rate": 3, "num_hidden_layers": 2},
}
LORA = ["--use_lora", "true", "--lora_r", "32", "--lora_alpha", "64", "--llm_learning_rate", "5e-4"]
CTC = ["--ctc_head", "linear", "--ctc_vocabulary", "llm", "--ctc_head_learning_rate", "1e-3"]
FROZEN = ["--freeze_audio_encoder", "true"]
# Name: adaptor, set, options of `finetune`.
VARIANTS = {
    **{name: (name, "first", []) for name in ADAPTORS},
    "real recordings": ("100ms", "first", []),
    "sampled texts alone": ("100ms", "sampled", []),
    "no replaced words": ("100ms", "whole", []),
    "frozen encoder": ("100ms", "first", FROZEN),
    "rule-based voices": ("100ms", "rule", []),
    "no noise and rooms": ("100ms", "clean", []),
    "LoRA": ("100ms", "first", LORA),
    "CTC loss": ("100ms", "first", CTC),
    "audio token dropout": ("100ms", "first", ["--audio_token_dropout", "0.1"]),
    "SpecAugment": ("100ms", "first", ["--spec_augment", "true"]),
}


@dataclass
class Job:
    """Commands that run one after the other.

    Args:
        name: name, also of the log.
        commands: returns the command lines; called when the job starts.
        result: file or folder that exists when the job is finished.
        needs: files and folders that must exist before.
        gpu: whether the job needs a place on a GPU.
    """

    name: str
    commands: object
    result: Path
    needs: list[Path] = field(default_factory=list)
    gpu: bool = True


def verb(name: str, *arguments) -> list[str]:
    return [sys.executable, "-m", "hf_speechllm", name, *map(str, arguments)]


class Experiment:
    """All jobs of the experiment, in order of importance."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.output_dir
        self.main_sets = [f"main{number}" for number in range(1, options.main_sets + 1)]
        self.tests = {path.parent.name if path.name == "test" else path.name: path for path in options.test}
        self.recorded = {"real": self.folder / "real/train"}
        if options.recordings is not None:
            self.recorded["recordings"] = options.recordings
        self.lists = {name: self.folder / f"{name}.jsonl" for name in self.recorded}

    def prepare(self) -> None:
        """Writes what takes no time: configurations, lists of the real recordings."""
        for name in ("log", "runs", "scores", "synthetic"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name, adaptor in ADAPTORS.items():
            config = {"audio_adaptor_config": {**adaptor, "projector_hidden_size": self.options.projector_size}}
            if self.options.encoder_window:
                config["encoder_window"] = self.options.encoder_window
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        stages = yaml.safe_load(Path(__file__).with_name("composed_en.yaml").read_text(encoding="utf-8"))
        synthetic, real = stages["stages"]
        sets = [str(self.folder / "synthetic" / name / "*.tar") for name in ("first", *self.main_sets)]
        recorded = [str(file) for file in self.lists.values()]
        synthetic |= {
            "train_file": [*sets, *recorded],
            "train_weight": [1.0] * len(sets) + [3.0, 2.0][: len(recorded)],
        }
        real["train_file"] = recorded[0]
        (self.folder / "stages.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
        shared = {**{key: value for key, value in stages.items() if key != "stages"}, **synthetic, "logging_steps": 25}
        shared |= {"per_device_train_batch_seconds": 200, "num_train_epochs": 4}
        del shared["train_file"], shared["train_weight"], shared["name"]
        (self.folder / "variant.yaml").write_text(yaml.safe_dump(shared), encoding="utf-8")
        lines = (self.options.real / "wav.scp").read_text(encoding="utf-8").splitlines()
        entries = [line.split(maxsplit=1) for line in lines]
        texts = dict(
            line.split(maxsplit=1) for line in (self.options.real / "text").read_text(encoding="utf-8").splitlines()
        )
        for split in ("train", "dev"):
            chosen = [item for number, item in enumerate(entries) if (number % 20 == 10) == (split == "dev")]
            part = self.folder / "real" / split
            part.mkdir(parents=True, exist_ok=True)
            paths = [f"{key} {(self.options.real / path).resolve()}\n" for key, path in chosen]
            (part / "wav.scp").write_text("".join(paths), encoding="utf-8")
            (part / "text").write_text("".join(f"{key} {texts[key]}\n" for key, _ in chosen), encoding="utf-8")
        self.tests["dev"] = self.folder / "real/dev"

    def jobs(self) -> list[Job]:
        """Returns all jobs."""
        names = [name for name in self.options.variants if name != "real recordings" or "recordings" in self.lists]
        used = {VARIANTS[name][1] for name in names}
        sets = ["first", *self.main_sets, *(name for name in SETS if name != "first" and name in used)]
        adaptors = sorted({self.options.adaptor, *(VARIANTS[name][0] for name in names)})
        return [
            Job("texts", lambda: [self.sampling()], self.folder / "texts.txt"),
            *[self.composition(name) for name in adaptors],
            *[self.listing(name, folder) for name, folder in self.recorded.items()],
            *[self.synthesis(name) for name in sets],
            *[self.main(seed) for seed in self.options.seeds],
            *[self.variant(name) for name in names],
        ]

    def listing(self, name: str, folder: Path) -> Job:
        return Job(name, lambda: [verb(
            "scp2jsonl", "--scp_file", folder / "wav.scp", "--transcript_file", folder / "text", "--jsonl_file",
            self.lists[name], "--prompt", PROMPT,
        )], self.lists[name], gpu=False)  # fmt: skip

    def sampling(self) -> list[str]:
        count = self.options.rows * min(5, 1 + len(self.main_sets))  # with more sets, texts repeat with other words
        arguments = [str(self.options.llm), str(count), str(self.folder / "texts.txt")]
        return [sys.executable, __file__, "texts", *arguments]

    def synthesis(self, name: str) -> Job:
        options, folder = self.options, self.folder / "synthetic" / name
        number = self.main_sets.index(name) + 1 if name in self.main_sets else 0

        def commands():
            # The first set and its counterparts have the same texts; each further set has its own.
            lines = (self.folder / "texts.txt").read_text(encoding="utf-8").splitlines()
            file = self.folder / f"texts-{name}.txt"
            chosen = [lines[index % len(lines)] for index in range(number * options.rows, (number + 1) * options.rows)]
            file.write_text("\n".join(chosen), encoding="utf-8")
            engines = {key: share for key, share in ENGINES.items() if key in options.engines}
            if name == "rule":
                engines = {key: share for key, share in engines.items() if key in ("espeak", "flite")}
            unfinished = folder.with_name(f"{name}.part")
            return [
                verb(
                    "synthesize", "--texts", file, "--output_dir", unfinished, "--prompt", PROMPT, "--seed", number,
                    "--rows_per_shard", 250, "--num_workers", max(1, len(os.sched_getaffinity(0)) - 2),
                    "--max_bad_fraction", 0.05, "--engines", *[f"{key}={share}" for key, share in engines.items()],
                    *self.set_options(name),
                ),
                [sys.executable, "-c", f"import os; os.rename({str(unfinished)!r}, {str(folder)!r})"],
            ]  # fmt: skip

        return Job(f"synthetic-{name}", commands, folder, [self.folder / "texts.txt"], gpu=False)

    def set_options(self, name: str) -> list[str]:
        words = self.options.word_list
        groups = [
            item for item in SETS.get(name, SETS["first"]) if words is not None or item not in (RANDOM, REPLACED)
        ]
        return [*sum(groups, []), *(["--word_list", str(words)] if words is not None else [])]

    def composition(self, name: str) -> Job:
        folder = self.folder / "init" / name
        command = verb(
            "compose", self.folder / f"{name}.yaml", "--audio_encoder", self.options.audio_encoder, "--llm",
            self.options.llm, "--output_dir", folder,
        )  # fmt: skip
        return Job(f"compose-{name}", lambda: [command], folder / "processor_config.json", gpu=False)

    def training(self, config: str, init: str, output: str, *options) -> list[str]:
        return verb(
            "finetune", self.folder / config, "--model_name_or_path", self.folder / "init" / init, "--output_dir",
            self.folder / "runs" / output, "--cache_dir", self.folder / "cache", "--report_to", "none",
            "--preprocessing_num_workers", max(1, len(os.sched_getaffinity(0)) // 2), *options,
            *(["--use_cpu", "true"] if not torch.cuda.is_available() else []),
            *(["--max_steps", "3"] if self.options.tiny else []),
        )  # fmt: skip

    def scoring(self, model: str, name: str) -> list[list[str]]:
        commands = []
        for test, folder in self.tests.items():
            output = self.folder / "scores" / name / test
            output.parent.mkdir(parents=True, exist_ok=True)
            commands += [
                verb(
                    "decode", "--model_name_or_path", self.folder / "runs" / model, "--scp_file", folder / "wav.scp",
                    "--prompt", PROMPT, "--max_new_tokens", 100, "--output_file", f"{output}.txt",
                ),
                verb("score", folder / "text", f"{output}.txt", "--output_dir", output, "--overwrite", "--no_audio"),
            ]  # fmt: skip
        return commands

    def variant(self, name: str) -> Job:
        adaptor, dataset, options = VARIANTS[name]
        key = name.replace(" ", "_")
        files = [self.folder / "synthetic" / dataset / "*.tar"]
        needs = [files[0].parent, self.folder / "init" / adaptor / "processor_config.json"]
        if name == "real recordings":
            files.append(self.lists["recordings"])
            needs.append(files[1])
        return Job(
            name,
            lambda: [
                self.training("variant.yaml", adaptor, key, "--train_file", *files, "--seed", "1", *options),
                *self.scoring(key, key),
            ],
            self.folder / "scores" / key / "dev/score.json",
            needs,
        )

    def main(self, seed: int) -> Job:
        name = f"main-{seed}"
        sets = [self.folder / "synthetic" / key for key in ("first", *self.main_sets)]
        return Job(
            name,
            lambda: [
                self.training("stages.yaml", self.options.adaptor, name, "--seed", seed),
                *self.scoring(f"{name}/real", f"{name}-real"),
                *self.scoring(f"{name}/synthetic", f"{name}-synthetic"),
            ],
            self.folder / "scores" / f"{name}-synthetic" / "dev/score.json",
            [*sets, *self.lists.values(), self.folder / "init" / self.options.adaptor / "processor_config.json"],
        )


def run_jobs(jobs: list[Job], options: argparse.Namespace) -> list[str]:
    """Runs jobs whose needs exist, in order; at most one synthesis and `runs_per_gpu` runs per GPU at a time.

    Returns:
        Names of the jobs that failed or did not end in time.
    """
    deadline = time.monotonic() + options.seconds
    gpus = [str(number) for number in range(torch.cuda.device_count())] or [""]
    running: dict[str, tuple[subprocess.Popen, list, Job, str]] = {}
    waiting, failed = [job for job in jobs if not job.result.exists()], []
    while (waiting or running) and time.monotonic() < deadline:
        for name, (process, commands, job, gpu) in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode == 0 and commands:
                running[name] = (start(commands.pop(0), job, gpu, options), commands, job, gpu)
                continue
            del running[name]
            if process.returncode or not job.result.exists():
                failed.append(name)
            show(f"{name}: {'failed' if name in failed else 'ended'}")
        for job in list(waiting):
            places = {gpu: sum(item[3] == gpu for item in running.values() if item[2].gpu) for gpu in gpus}
            gpu = min(places, key=places.get)
            synthesis = job.name.startswith("synthetic")
            if not all(path.exists() for path in job.needs) or (job.gpu and places[gpu] >= options.runs_per_gpu):
                continue
            if synthesis and any(name.startswith("synthetic") for name in running):
                continue
            waiting.remove(job)
            commands = job.commands()
            running[job.name] = (start(commands.pop(0), job, gpu, options), commands, job, gpu)
            show(f"{job.name}: started")
        if not running and waiting:
            break  # what they need has failed
        time.sleep(0.2)
    for process, *_ in running.values():
        process.terminate()
    return failed + list(running) + [job.name for job in waiting]


def start(command: list[str], job: Job, gpu: str, options: argparse.Namespace) -> subprocess.Popen:
    log = (options.output_dir / "log" / f"{job.name.replace(' ', '_')}.log").open("a", encoding="utf-8")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": gpu,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpu:
        del environment["CUDA_VISIBLE_DEVICES"]
    with log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def show(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def results(experiment: Experiment) -> list[dict]:
    """Returns a line for each scored model."""
    lines = []
    for folder in sorted((experiment.folder / "scores").iterdir()):
        scores = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/score.json")
        }
        if not scores:
            continue
        run = experiment.folder / "runs" / folder.name
        if folder.name.startswith("main-"):
            name, _, stage = folder.name.rpartition("-")
            run = experiment.folder / "runs" / name / stage
        state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        seconds = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
        lines.append({
            "model": folder.name.replace("_", " "),
            "error_rates": {name: score["rate"] for name, score in sorted(scores.items())},
            "intervals_95": {name: score["interval_95"] for name, score in sorted(scores.items())},
            "steps": state["global_step"], "epochs": state["epoch"], "losses": losses[:1] + losses[-1:],
            "seconds": seconds[-1] if seconds else None,
            "rows_per_set": experiment.options.rows, "main_sets": experiment.options.main_sets,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__, "transformers": transformers.__version__, "date": date.today().isoformat(),
        })  # fmt: skip
    return lines


def sample_texts(llm: str, count: int, path: Path) -> None:
    """Writes sentences sampled from the LLM, in random order."""
    import random

    from hf_speechllm.data.synthesis import clean_texts
    from hf_speechllm.inference.text_sampling import sample_sentences

    texts = sample_sentences(llm, count, clean_texts, BEGINNINGS, report=lambda number: show(f"{number} texts"))
    random.Random(0).shuffle(texts)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--audio_encoder", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--real", type=Path, required=True, help="folder with wav.scp and text")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="folders with wav.scp and text")
    parser.add_argument("--recordings", type=Path, help="folder with wav.scp and text of other speakers")
    parser.add_argument("--word_list", type=Path, help="words for rows of random words, see `word_list.py`")
    parser.add_argument("--adaptor", default="100ms", choices=list(ADAPTORS), help="of the main run")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--texts", type=Path, help="texts to speak, instead of sampled ones")
    parser.add_argument("--encoder_window", type=float, default=5.0, help="seconds; 0: whole windows of 30 s")
    parser.add_argument("--rows", type=int, default=12_000, help="rows of a set of synthetic speech")
    parser.add_argument("--main_sets", type=int, default=6, help="further sets for the main run")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--projector_size", type=int, default=2048)
    parser.add_argument("--runs_per_gpu", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--tiny", action="store_true", help="three steps per run")
    return parser.parse_args()


def main() -> int:
    if sys.argv[1:2] == ["texts"]:
        sample_texts(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return 0
    options = parse_arguments()
    options.output_dir = options.output_dir.resolve()
    experiment = Experiment(options)
    experiment.prepare()
    if options.texts is not None:
        shutil.copy(options.texts, options.output_dir / "texts.txt")
    unfinished = run_jobs(experiment.jobs(), options)
    lines = results(experiment)
    (options.output_dir / "results.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    for line in lines:
        print(json.dumps(line))
    if unfinished:
        show(f"not finished: {', '.join(unfinished)}; logs: {options.output_dir / 'log'}")
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
