"""Sample launch files: accelerate reads them, the shell parses them, and what they say is understood here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from stepdistill import distributed
from stepdistill.placement import Placement, sharded

LAUNCH = Path(__file__).resolve().parents[1] / "train" / "launch"
CONFIGS = sorted(LAUNCH.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_a_config_and_knows_all_of_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == {"one_gpu_24gb": 1, "eight_gpus_fsdp2": 8, "nodes": 16}[path.stem]
    assert config.mixed_precision == "no"  # anything else has to agree with the recipe
    assert not set(yaml.safe_load(path.read_text())) - set(vars(config))


@pytest.mark.parametrize(("name", "shards"), [("eight_gpus_fsdp2", True), ("nodes", False)])
def test_a_launchers_config_decides_about_shards(name: str, shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that accelerate itself makes of the file."""
    args = launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH / f"{name}.yaml"), "--main_process_ip", "127.0.0.1", "-m", "stepdistill"]
    )
    args, _, _ = _validate_launch_command(args)
    for key, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "world", lambda: 8)
    distributed.refuse_other_precision("bfloat16")
    assert sharded(Placement()) is shards
    if shards:
        with pytest.raises(ValueError, match=r"placement.offload is for networks that are not sharded"):
            sharded(Placement(offload=("teacher",)))
        monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        with pytest.raises(ValueError, match=r"name networks in placement.checkpointing instead"):
            sharded(Placement())


def test_a_precision_that_is_not_the_recipes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    distributed.refuse_other_precision("bfloat16")
    with pytest.raises(ValueError, match=r"accelerate's mixed_precision is 'bf16' and run.dtype is 'float32'"):
        distributed.refuse_other_precision("float32")


def test_the_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"], check=True)
