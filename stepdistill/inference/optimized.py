"""One switch for fast few-step sampling of a live pipeline, and each of its parts; all of it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn

from stepdistill.inference.compiling import check_compiler, compile_forward
from stepdistill.inference.kv_cache import KVCache, takes_kv_cache
from stepdistill.inference.prompt_cache import PromptCache
from stepdistill.inference.sampler import StudentSampler
from stepdistill.models.families.base import family_of

Mode = Literal["default", "reduce-overhead", "max-autotune"]
_MARK = "_stepdistill_optimized"
_IMAGE_DECODERS = (AutoencoderKL, AutoencoderTiny)


@dataclass(frozen=True)
class Parts:
    """What ``optimize`` does."""

    cache_text: bool = True
    """Encode each prompt once, and compute its keys and values of cross-attention once; exact, bit for bit."""
    channels_last: bool = True
    """Lay UNets and image decoders out for convolutions; other sums, so equal to rounding."""
    compile: bool | Mode = False
    """Compile denoiser and decoder with torch.compile, for one shape at a time (True is "default"); to rounding."""
    tiny_decoder: str | Path | AutoencoderTiny | None = None
    """A folder, a hub id or a live ``AutoencoderTiny`` to decode with: other images, and the quickest part to gain."""
    cuda_graph: bool = False
    """Record the few-step loop and the decoder as one CUDA graph for each batch size, and replay it; needs a GPU."""
    backend: str = "inductor"
    """Of torch.compile."""

    def __post_init__(self) -> None:
        """Check what would only show later."""
        modes = (False, True, "default", "reduce-overhead", "max-autotune")
        if self.compile not in modes:
            raise ValueError(f"compile must be one of {', '.join(map(str, modes))}; got {self.compile!r}")
        if self.cuda_graph and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(f"cuda_graph and compile={self.compile!r} both record CUDA graphs; use compile='default'")


class Optimized:
    """A live pipeline that is optimised until ``undo``, or until the end of its ``with`` block.

    The pipeline keeps its class and is called as before. ``stepdistill.sample`` of it takes the few-step loop of
    ``sampler``, which spends little beside the network evaluations themselves.
    """

    def __init__(self, pipeline: DiffusionPipeline, parts: Parts):
        self.pipeline, self.parts = pipeline, parts
        self.kv: KVCache | None = None
        self._sampler: StudentSampler | None = None
        self._undo = ExitStack()
        try:
            self._apply()
        except BaseException:
            self._undo.close()
            raise

    @property
    def sampler(self) -> StudentSampler:
        """The few-step loop of the student that the pipeline holds.

        Raises:
            ValueError: if it holds none.
        """
        if self._sampler is None:
            _tell_tokens(self.pipeline, self._undo)
            self._sampler = StudentSampler(self.pipeline, self.kv, cuda_graph=self.parts.cuda_graph)
        return self._sampler

    def undo(self) -> None:
        """Leave the pipeline as it was."""
        self._undo.close()

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _apply(self) -> None:
        pipeline, parts = self.pipeline, self.parts
        net = pipeline.components[family_of(pipeline).module]
        device = _device(pipeline, net)
        if parts.cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph: the pipeline is on {device.type}; move it to a GPU, or leave cuda_graph out")
        if parts.compile and parts.backend == "inductor":
            check_compiler(device)
        setattr(pipeline, _MARK, self)
        self._undo.callback(delattr, pipeline, _MARK)
        if parts.tiny_decoder is not None:
            self._undo.callback(setattr, pipeline, "vae", _decoder(pipeline))
            pipeline.vae = _tiny(parts.tiny_decoder, pipeline)
        decoder = pipeline.components.get("vae")
        decoder = decoder if isinstance(decoder, _IMAGE_DECODERS) else None
        if parts.channels_last:
            for module in (net, decoder):
                if isinstance(module, (UNet2DConditionModel, UNet2DModel, *_IMAGE_DECODERS)):
                    self._undo.callback(module.to, memory_format=torch.contiguous_format)
                    module.to(memory_format=torch.channels_last)
        if parts.cache_text:
            self._cache_text(net)
        if parts.compile:
            mode = "default" if parts.compile is True else parts.compile
            for module in (net, None if decoder is None else decoder.decoder):
                if module is not None:
                    self._undo.callback(compile_forward(module, mode, parts.backend))

    def _cache_text(self, net: nn.Module) -> None:
        if takes_kv_cache(net):
            self.kv = KVCache(net)
            self._undo.callback(self.kv.remove)
        if not hasattr(self.pipeline, "encode_prompt"):
            return  # takes no prompts
        cache, kv = PromptCache(self.pipeline), self.kv

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            if kv is not None:
                kv.check()  # once for a call of the pipeline
            return cache(*args, **kwargs)

        self.pipeline.encode_prompt = encode_prompt
        self._undo.callback(delattr, self.pipeline, "encode_prompt")


def optimize(pipeline: DiffusionPipeline, **parts: Any) -> Optimized:
    """Make a live pipeline sample faster; the pipeline is changed in place, until ``undo()`` of what is returned.

    Nothing about guidance is changed: an exported student's recorded arguments never run a negative branch, and
    ``stepdistill.sample`` passes them.

    Args:
        pipeline: any pipeline that a family knows; teachers too.
        parts: see ``Parts``; without any, everything that leaves the images as they are to rounding and needs no
            compiler.

    Raises:
        ValueError: if it is optimised already, a part is unknown, or one does not fit the pipeline or the machine.
        OSError: if the tiny decoder is not there.
    """
    known = [field.name for field in fields(Parts)]
    for name in parts:
        if name not in known:
            raise ValueError(f"optimize: no part {name!r}; parts are {', '.join(known)}")
    return optimize_by(pipeline, Parts(**parts))


def optimize_by(pipeline: DiffusionPipeline, parts: Parts) -> Optimized:
    """See ``optimize``."""
    if optimized_of(pipeline) is not None:
        raise ValueError(f"this {type(pipeline).__name__} is optimised already; call undo() of what optimize returned")
    return Optimized(pipeline, parts)


def optimized_of(pipeline: DiffusionPipeline) -> Optimized | None:
    """What was made of a pipeline by ``optimize``; None where it is as it was."""
    return vars(pipeline).get(_MARK)


def _tell_tokens(pipeline: DiffusionPipeline, undo: ExitStack) -> None:
    """A stock call is passed the number of text tokens; families read it from the pipeline's config."""
    record = pipeline.scheduler.config.get("_student") or {"call": {}}
    if "max_sequence_length" in record["call"]:
        undo.callback(setattr, pipeline, "_internal_dict", pipeline.config)
        pipeline.register_to_config(_max_sequence_length=record["call"]["max_sequence_length"])


def _device(pipeline: DiffusionPipeline, net: nn.Module) -> torch.device:
    """Where the denoiser is.

    Raises:
        ValueError: if its weights come and go.
    """
    device = next(net.parameters()).device
    if device.type == "meta" or getattr(pipeline, "_all_hooks", None):
        raise ValueError(f"this {type(pipeline).__name__} is offloaded; remove_all_hooks() first, or leave it as it is")
    return device


def _decoder(pipeline: DiffusionPipeline) -> AutoencoderKL | AutoencoderTiny:
    decoder = pipeline.components.get("vae")
    if not isinstance(decoder, _IMAGE_DECODERS):
        raise ValueError(
            f"tiny_decoder: this {type(pipeline).__name__} decodes by {type(decoder).__name__}; AutoencoderTiny stands "
            "in for AutoencoderKL alone, leave tiny_decoder out"
        )
    return decoder


def _tiny(source: str | Path | AutoencoderTiny, pipeline: DiffusionPipeline) -> AutoencoderTiny:
    """The tiny decoder, on the pipeline's device and in its dtype.

    Raises:
        ValueError: if it makes other images of other latents.
    """
    old, tiny = _decoder(pipeline), source
    if not isinstance(tiny, AutoencoderTiny):
        try:
            tiny = AutoencoderTiny.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError) as error:  # diffusers says so in many lines
            reason = " ".join(str(error).split())
            raise OSError(f"tiny_decoder {source}: no folder or hub id of an AutoencoderTiny ({reason})") from error
    sizes: Callable[[nn.Module], tuple[int, int]] = lambda vae: (  # noqa: E731
        vae.config.latent_channels,
        2 ** (len(vae.config.get("decoder_block_out_channels") or vae.config.block_out_channels) - 1),
    )
    if sizes(tiny) != sizes(old):
        (channels, factor), (own_channels, own_factor) = sizes(tiny), sizes(old)
        raise ValueError(
            f"tiny_decoder: takes latents of {channels} channels and enlarges {factor} times; this pipeline's have "
            f"{own_channels} and need {own_factor}"
        )
    return tiny.to(old.device, old.dtype).eval()
