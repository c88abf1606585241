"""The configurations in recipes/accelerate: what ``accelerate launch`` makes of them, and one real launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import LEARNED, assert_same

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "recipes" / "accelerate"


def parsed(config: str) -> tuple[object, dict[str, str]]:
    """Return the launcher's arguments, and the environment that it gives its processes."""
    options = ["--config_file", str(CONFIGURATIONS / config), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize(
    ("config", "processes", "kind"),
    [
        ("single.yaml", 1, (False, False)),
        ("ddp.yaml", 2, (True, False)),
        ("fsdp2.yaml", 2, (False, True)),
        ("pipeline.yaml", 2, (True, False)),
    ],
)
def test_a_configuration_is_what_it_says(config, processes, kind):
    args, environment = parsed(config)
    assert args.num_processes == processes
    assert (args.multi_gpu, args.use_fsdp) == kind
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def configured(folder: Path, environment: dict[str, str]) -> jobs.Trained:
    """A training whose options say nothing of FSDP: the environment does."""
    os.environ |= {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_USE", "FSDP"))}
    return jobs.train("gpt2", folder, dtype=torch.float32, max_steps=2, **LEARNED | jobs.as_if_on_gpus())


def test_fsdp2_is_fsdp2(processes, tmp_path):
    _, environment = parsed("fsdp2.yaml")
    first, second = processes.run(configured, tmp_path, environment)
    assert first.wrapper == "FSDPGPT2LMHeadModel"
    assert_same(second.weights, first.weights)


def test_a_recipe_with_ddp_on_two_processes(tmp_path):
    """As recipes/accelerate/ddp.yaml says, made small."""
    recipe = [str(ROOT / "recipes" / name) for name in ("wikitext103.py", "demo.yaml")]
    small = "--max_steps 2 --hidden_size 16 --num_hidden_layers 2 --logging_steps 1 --validation_rows 5"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(CONFIGURATIONS / "ddp.yaml"), *recipe, "--use_cpu", "True", *small.split()]
    command += ["--preprocessing_workers", "1", "--output_dir", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "all_results.json").read_text())
    samples = results["train_samples_per_second"] * results["train_runtime"]
    assert samples == pytest.approx(2 * 2 * 8, rel=1e-2)  # steps, processes, samples of each
    assert {"model.safetensors", "README.md", "alignment.json"} <= {file.name for file in tmp_path.iterdir()}
