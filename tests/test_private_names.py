"""Every use of a private name of another library needs a listed reason; an unlisted use fails.

A private name has a leading underscore. An assigned `forward` or `__class__`, and an assigned attribute of another
library's module, count as private names too. They are allowed in `fast/`, in `model/` as attributes that transformers
requires in subclasses of models, and in `training/trainer.py` as a few overrides.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import hf_speechllm

LIBRARIES = {"torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "torchaudio", "triton"}
PACKAGE = Path(hf_speechllm.__file__).parent
PATCHES = {"forward", "__class__"}
STANDARD = {"_asdict", "_replace", "_exit", "_abc_impl", "_backward_cls"}  # names of Python and of metaclasses
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)

# (file, name): reason.
ALLOWED: dict[tuple[str, str], str] = {
    # attributes that transformers requires in subclasses of models
    ("model/adaptors.py", "_no_split_modules"): "layers that an engine keeps together",
    ("model/adaptors.py", "_supports_attention_backend"): "attention by name",
    ("model/adaptors.py", "_supports_flash_attn"): "attention by name",
    ("model/adaptors.py", "_supports_sdpa"): "attention by name",
    ("model/ctc.py", "_from_config"): "builds the blocks of FunASR's head, and a head for an existing model",
    ("model/ctc.py", "_no_split_modules"): "layers that an engine keeps together",
    ("model/ctc.py", "_supports_attention_backend"): "attention by name",
    ("model/ctc.py", "_supports_flash_attn"): "attention by name",
    ("model/ctc.py", "_supports_sdpa"): "attention by name",
    ("model/modeling.py", "_can_compile_fullgraph"): "compiled generation",
    ("model/modeling.py", "_from_config"): "builds the adaptor with its attention implementation",
    ("model/modeling.py", "_skip_keys_device_placement"): "the key-value cache stays on its device",
    ("model/modeling.py", "_supports_attention_backend"): "attention by name",
    ("model/modeling.py", "_supports_flash_attn"): "attention by name",
    ("model/modeling.py", "_supports_sdpa"): "attention by name",
    ("model/packing.py", "_attn_implementation"): "the attention that a part has got",
    # overrides of the Trainer, and calls of its parts
    ("training/trainer.py", "_clip_grad_norm"): "the norm is checked once, where it is measured",
    ("training/trainer.py", "_finalize_training"): "waits for a background save; a preempted run ends here",
    ("training/trainer.py", "_init_training_state"): "a resumed run starts in the epoch of its position",
    ("training/trainer.py", "_load_from_checkpoint"): "checkpoints may leave out frozen parts",
    ("training/trainer.py", "_run_epoch"): "a resumed epoch has fewer steps",
    ("training/trainer.py", "_save_checkpoint"): "checkpoints appear whole or not at all",
    ("training/trainer.py", "_load_best_model"): "called for engines that shard, and for adapters",
    ("training/trainer.py", "_save_optimizer_and_scheduler"): "called for engines that shard",
    ("training/trainer.py", "_save_rng_state"): "called to write random numbers",
    ("training/trainer.py", "_save_scaler"): "called to write a loss scale",
    # fast paths
    ("fast/attention.py", "_attn_implementation"): "the attention that a part has got",
    ("fast/attention.py", "_flash_attention_forward"): "torch's flash kernel for rows of different lengths",
    ("fast/attention.py", "forward ="): "the encoder's forward pass, with positions",
    ("fast/compilation.py", "_dynamo"): "limits of graphs",
    ("fast/compilation.py", "_inductor"): "one graph for all sizes",
    ("fast/compilation.py", "forward ="): "a layer's forward pass is that of its group",
    (
        "fast/compilation.py",
        "torch._dynamo.config.cache_size_limit =",
    ): "graphs of first and last, trained and frozen layers",
    ("fast/compilation.py", "torch._dynamo.config.optimize_ddp ="): "graphs are not split at DDP's buckets",
    (
        "fast/compilation.py",
        "torch._inductor.config.triton.mix_order_reduction_non_strict_mode =",
    ): "small batches get no graphs of their own",
    ("fast/fsdp.py", "_foreach_mul_"): "clips all shards by one call",
    ("fast/fsdp.py", "_foreach_norm"): "measures all shards by one call",
    ("fast/fsdp.py", "_init_group"): "AdamW on plain shards",
    ("fast/fsdp.py", "_local_tensor"): "the shard of a rank",
    ("fast/fsmn.py", "__class__ ="): "FSMN blocks keep weights and names",
    (
        "model/loss.py",
        "forward =",
    ): "the head is called once, as a module, so that engines gather its weight; restored at once",
    ("model/processing.py", "_process_audio"): "the features of a call, where transformers' processors compute them",
}


def modules():
    """Returns the modules of the package as (file, syntax tree)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name not in STANDARD and name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names() -> set[str]:
    """Returns private names that the package defines, including overrides (see `overrides`)."""
    names = set()
    for _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                root = node.value
                if isinstance(root, ast.Name) and root.id == "self":
                    names.add(node.attr)
    return names


def root_of(node: ast.expr) -> ast.expr:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def uses(tree: ast.AST, own: set[str]) -> set[str]:
    """Returns private names of other libraries that a module uses or replaces."""
    found, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(item.asname or item.name).split(".")[0] for item in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in LIBRARIES:
            imported |= {item.asname or item.name for item in node.names}
            pieces = (node.module or "").split(".")
            found |= {item.name for item in node.names if is_private(item.name)}
            found |= {piece for piece in pieces if is_private(piece)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "setattr"}:
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
            if isinstance(name, str) and (is_private(name) and name not in own or name in PATCHES):
                found.add(name)
        targets = getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(node, ASSIGNMENTS) else []
        for target in targets:
            if not isinstance(target, ast.Attribute):
                continue
            root = root_of(target)
            if target.attr in PATCHES:
                found.add(f"{target.attr} =")
            elif isinstance(root, ast.Name) and root.id in imported:
                found.add(f"{ast.unparse(target)} =")
    return found


def overrides() -> set[tuple[str, str]]:
    """Returns private methods and attributes of other libraries' classes that the package overrides."""
    found = set()
    for info in pkgutil.walk_packages([str(PACKAGE)], "hf_speechllm."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:  # a library for GPUs
            assert any(name in str(error) for name in ("triton", "deepspeed", "gradio")), error
            continue
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != info.name:
                continue
            outside = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
            for name in vars(cls):
                if is_private(name) and any(name in vars(base) for base in outside):
                    file = f"{info.name.removeprefix('hf_speechllm.').replace('.', '/')}.py"
                    found.add((file, name))
    return found


@pytest.fixture(scope="module")
def found():
    own = own_names()
    return {(file, name) for file, tree in modules() for name in uses(tree, own)} | overrides()


def test_every_private_name_of_another_library_has_a_reason(found):
    new = sorted(found - ALLOWED.keys())
    assert not new, f"private names of other libraries without a reason in ALLOWED: {new}"


def test_every_listed_name_is_used(found):
    gone = sorted(ALLOWED.keys() - found)
    assert not gone, f"no longer used; remove them from ALLOWED: {gone}"


def test_private_names_are_used_only_in_allowed_modules():
    places = ("fast/", "model/", "training/trainer.py")
    elsewhere = [entry for entry in ALLOWED if not entry[0].startswith(places)]
    assert not elsewhere


def test_the_trainer_overrides_few_private_methods():
    assert sum(file == "training/trainer.py" for file, _ in overrides()) <= 6


@pytest.mark.parametrize(
    "line, name",
    [
        ("model.forward = f", "forward ="),
        ("module.__class__ = C", "__class__ ="),
        ("from torch import _foreach_norm", "_foreach_norm"),
        ("import torch\ntorch.backends.cudnn.benchmark = True", "torch.backends.cudnn.benchmark ="),
        ("config._attn_implementation", "_attn_implementation"),
        ("getattr(parameter, '_local_tensor')", "_local_tensor"),
        ("from transformers.trainer import x\nx.y = 1", "x.y ="),
    ],
)
def test_scanner_finds(line, name):
    assert uses(ast.parse(line), set()) == {name}


def test_scanner_ignores_names_of_the_package():
    assert uses(ast.parse("self._mine = 1\nitem.value = 2\nother._mine()"), {"_mine"}) == set()
