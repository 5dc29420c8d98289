"""Attacks on checkpoints of a run that is resumed: the last good state comes back, or one clear line; every file stays.

The networks have a few dozen weights: what is attacked is the file's structure, and an example takes milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_parts import JSON, Attack, Draw, Ended, assert_one_clear_line, files, places
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.checkpoint import checksum, read_checkpoint
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import RectifiedFlow
from stepdistill.student import Student
from stepdistill.testing import mlp
from stepdistill.trainer import AdamW, Run, Trainer

OBJECTIVE = DMD2(student_every=2, gan=Gan(weight=0.0))
SPECS = dict.fromkeys(("student", "critic"), AdamW(1e-3))
RUN = Run(steps=4, batch=2, log_every=1, save_every=2, keep_last=2, ema=0.5)


def batches(step: Step) -> Batch:
    """Pairs of numbers."""
    return Batch({}, (RUN.batch, 2), x0=step.randn((RUN.batch, 2)))


def new_trainer(out: Path) -> Trainer:
    """A trainer in ``out`` of the smallest networks there are, everyone's weights zero."""
    torch.set_num_threads(1)
    teacher = Denoiser(mlp(2, width=2, depth=1), RectifiedFlow(), "velocity")
    nets = Nets()
    nets["teacher"] = Guided(teacher)
    nets["student"] = Student(Sampler(trailing(2)), copy.deepcopy(teacher.net), teacher.schedule, teacher.kind)
    nets["critic"] = Denoiser(copy.deepcopy(teacher.net), teacher.schedule, teacher.kind)
    for name in SPECS:
        nets[name].requires_grad_(True)
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in SPECS.items()}
    return Trainer(nets, OBJECTIVE, optimizers, batches, RUN, specs=SPECS, out=out)


@functools.cache
def finished() -> tuple[Path, dict[int, dict[str, Tensor]]]:
    """The folder of a run with checkpoints of steps 2 and 4, and everyone's weights at each."""
    out = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    atexit.register(shutil.rmtree, out)
    trainer = new_trainer(out)
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.fit()
    states = {}
    for path in sorted((out / "checkpoints").iterdir()):
        states[int(path.stem)] = _weights(read_checkpoint(path, verify=True)[1])
    return out, states


@functools.cache
def other() -> bytes:
    """A checkpoint of a run with a smaller critic."""
    meta, tensors = read_checkpoint(finished()[0] / "checkpoints" / "00000004.safetensors")
    return signed(meta, {k: v for k, v in tensors.items() if not k.startswith("nets.critic.")})


def signed(meta: Any, tensors: dict[str, Tensor]) -> bytes:
    """A checkpoint file with the checksum that belongs to its content."""
    text = json.dumps(meta)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one"
        save_file(tensors, file, metadata={"stepdistill": text, "sha256": checksum(text, tensors)})
        return file.read_bytes()


def checkpoint_bytes(draw: Draw, folder: Path) -> Ended:
    """Files that were bent, cut, emptied, exchanged, or are something else."""
    return _resumed(draw, folder, _bent)


def checkpoint_content(draw: Draw, folder: Path) -> Ended:
    """Files whose checksum is right, and whose tensors or description are not."""
    return _resumed(draw, folder, _forged)


def _bent(draw: Draw, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    how = draw(st.sampled_from(["flipped", "header", "cut", "empty", "bytes", "longer", "other", "folder"]))
    if how == "flipped":
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "header":
        raw[draw(st.integers(0, 3000))] ^= 1 << draw(st.integers(0, 7))
    elif how == "cut":
        del raw[draw(st.integers(0, len(raw) - 1)) :]
    elif how == "longer":
        raw += draw(st.binary(min_size=1, max_size=9))
    elif how == "folder":
        file.unlink()
        file.mkdir()
        return
    else:
        raw = bytearray({"empty": b"", "bytes": draw(st.binary(max_size=40)), "other": other()}[how])
    file.write_bytes(bytes(raw))


def _forged(draw: Draw, file: Path) -> None:
    meta, tensors = read_checkpoint(file)
    how = draw(st.sampled_from(["dtype", "shape", "drop", "add", "slot", "meta", "unmeta"]))
    name = draw(st.sampled_from(sorted(tensors)))
    if how == "dtype":
        tensors[name] = tensors[name].to(draw(st.sampled_from([torch.float16, torch.int64, torch.float64, torch.bool])))
    elif how == "shape":
        tensors[name] = draw(st.sampled_from([tensors[name][None], tensors[name].flatten()[:1], torch.zeros(0)]))
    elif how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[
            draw(st.sampled_from(["x", "nets.y.z", "optim.student.9999.exp_avg", "optim.student.a", "optim.x.0.step"]))
        ] = torch.zeros(2)
    elif how == "slot":
        slots = [k for k in sorted(tensors) if k.startswith("optim.")]
        del tensors[draw(st.sampled_from(slots))]
    elif how == "meta":
        container, key = draw(st.sampled_from(list(places(meta))))
        container[key] = draw(JSON)
    else:
        container, key = draw(st.sampled_from(list(places(meta))))
        del container[key]
    file.write_bytes(signed(meta, {k: v.contiguous() for k, v in tensors.items()}))


def _resumed(draw: Draw, folder: Path, damage: Callable[[Draw, Path], None]) -> Ended:
    """Damage one checkpoint or both of a finished run, and resume.

    Raises:
        AssertionError: if a state comes back that no checkpoint held, if it ends in anything but the last good one or
            one clear line, or if a file is gone.
    """
    source, states = finished()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    paths = sorted((folder / "checkpoints").iterdir())
    for path in draw(st.sampled_from([paths[1:], paths[1:], paths[:1], paths])):
        damage(draw, path)
    if draw(st.integers(0, 9)) == 0:
        swap = folder / "swap"
        for one, another in ((paths[0], swap), (paths[1], paths[0]), (swap, paths[1])):
            one.rename(another)
    before = files(folder)
    trainer = new_trainer(folder)
    with torch.no_grad():
        for value in trainer.nets.trainable_state().values():
            value.fill_(0)  # nothing may be left of the example before
    try:
        resumed = trainer.resume()
    except (ValueError, OSError) as error:
        assert_one_clear_line(str(error))
        assert str(folder) in str(error), f"it does not say which file: {error}"
        resumed = None
    after = files(folder)
    metrics = str(folder / "metrics.jsonl")
    assert before.keys() == after.keys(), "a file is gone"
    assert all(before[k] == after[k] for k in before if k != metrics), "a checkpoint was changed"
    if resumed is None:
        assert before[metrics] == after[metrics], "metrics were cut though nothing was resumed"
        return "refused"
    if damage is _bent:  # what is forged may well hold other weights, or another step
        assert resumed and trainer.index in states, f"resumed at step {trainer.index}"
        found = trainer.nets.trainable_state()
        wrong = [k for k, v in states[trainer.index].items() if not torch.equal(v, found[k])]
        assert not wrong, f"weights of no checkpoint: {wrong[0]}"
    trainer.index = min(trainer.index, RUN.steps - 1)
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.step(trainer.index)  # optimizers and metrics must be usable too
        trainer.metrics.write(trainer.index)
    return "resumed"


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("nets."): v.clone() for k, v in tensors.items() if k.startswith("nets.")}


ATTACKS: dict[str, Attack] = {"checkpoint bytes": checkpoint_bytes, "checkpoint content": checkpoint_content}
