"""The command `average`."""

import torch
from safetensors.torch import load_file


def test_checkpoints_are_averaged_and_nothing_is_overwritten(compose_tiny, run_recipe, tmp_path, capsys):
    inputs = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    for seed, folder in enumerate(inputs):
        for part in compose_tiny(seed=seed):
            part.save_pretrained(folder)
    output = tmp_path / "mean"
    output.mkdir()  # an empty folder is fine
    assert run_recipe("average_checkpoints.py", "--inputs", *inputs, "--output", output) is None
    assert f"{output}: mean of 2 checkpoints" in capsys.readouterr().out
    first, second, mean = (load_file(folder / "model.safetensors") for folder in (*inputs, output))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)

    written = (output / "model.safetensors").stat().st_mtime_ns
    message = run_recipe("average_checkpoints.py", "--inputs", *inputs, "--output", output)
    assert message.startswith("average_checkpoints.py: error: ") and "exists" in message
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    message = run_recipe("average_checkpoints.py", "--inputs", *inputs, "--output", tmp_path / "x", "--exact_lora")
    assert "leave the option out for full models" in message
