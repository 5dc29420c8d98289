"""Class-conditional images in a few steps: a UNet2DModel teacher, or the student distilled out of it.

One self-contained file for diffusers' ``custom_pipeline=``; it needs torch and diffusers and nothing else. A student
knows the steps it was trained for and refuses any others; its scheduler config alone yields their timesteps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, TCDScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

TEACHER_STEPS = 50
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images of given classes.

    Args:
        unet: a ``UNet2DModel`` with ``num_class_embeds``.
        scheduler: any VP scheduler of diffusers; a student's must yield its trained timesteps.
        null_label: the label that stands for no class, needed for guidance.
        trained_steps: the step counts that a student was trained for; None for a teacher, which takes any.
        gamma: stochasticity in [0, 1] of the steps of a ``TCDScheduler``; None leaves its default.

    Raises:
        ValueError: if the network takes no class labels, or one of the others is out of range.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        null_label: int | None = None,
        trained_steps: list[int] | None = None,
        gamma: float | None = None,
    ):
        super().__init__()
        classes = unet.config.num_class_embeds
        if classes is None:
            raise ValueError("unet has no num_class_embeds, so it takes no class labels; use DDIMPipeline for it")
        if null_label is not None and not 0 <= null_label < classes:
            raise ValueError(f"null_label must lie in 0 to {classes - 1}, the labels of this network; got {null_label}")
        if trained_steps is not None and (not trained_steps or min(trained_steps) < 1):
            raise ValueError(f"trained_steps must be a list of step counts such as [4], or None; got {trained_steps}")
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_label=null_label, trained_steps=trained_steps, gamma=gamma)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per label.

        Args:
            class_labels: one label or B of them.
            num_inference_steps: number of steps; by default what the student was trained for, 50 for a teacher.
            guidance_scale: classifier-free guidance, ``null + scale (cond - null)``; 1 is the plain conditional
                model and costs one evaluation a step, anything else costs two, in one batch.
            generator: source of all noise; a list of B makes every image independent of its batch.
            latents: standard normal noise to start from, (B, C, H, W); drawn when left out.
            output_type: "pil" (grey images in mode L), "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent"
                for (B, C, H, W) in the model's own range around [-1, 1], not clamped.
            return_dict: return an ``ImagePipelineOutput``, else a tuple of one.

        Returns:
            The images, as ``output_type`` says.

        Raises:
            ValueError: for labels out of range, steps that the student was not trained for, guidance without a null
                label, an unknown output type, or noise and generators that do not fit the batch.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        labels = self._labels(class_labels)
        self._check_guidance(guidance_scale)
        timesteps = self._timesteps(num_inference_steps)
        x = self._noise(len(labels), generator, latents) * self.scheduler.init_noise_sigma

        takes = inspect.signature(self.scheduler.step).parameters  # schedulers differ in what their step accepts
        tcd = isinstance(self.scheduler, TCDScheduler)
        options = {"generator": generator} if "generator" in takes else {}
        if tcd and self.config.gamma is not None:
            options["eta"] = self.config.gamma

        for i, t in enumerate(self.progress_bar(timesteps)):
            output = self._predict(self.scheduler.scale_model_input(x, t), t, labels, guidance_scale)
            if tcd and i == len(timesteps) - 1:
                # TCDScheduler ends at table entry 0 and so leaves sigma_0 eps in the image, about 0.01 of it
                x = self._clean(output, x, t)
            else:
                x = self.scheduler.step(output, t, x, **options, return_dict=False)[0]

        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        classes, null = self.unet.config.num_class_embeds, self.config.null_label
        wanted = f"class_labels must be integers from 0 to {classes - 1}"
        wanted += "" if null is None else f" ({null} stands for no class)"
        try:
            labels = torch.as_tensor(class_labels).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{wanted}; got {class_labels!r}") from error
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or not len(labels):
            raise ValueError(f"{wanted}; got {class_labels!r}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{wanted}; got {labels.unique().tolist()}")
        return labels.to(self._execution_device, torch.int64)

    def _check_guidance(self, scale: float) -> None:
        if scale == 1:
            return
        if self.config.null_label is None:
            raise ValueError(f"guidance_scale {scale} needs a null label, and this pipeline has none; use 1")
        if self.config.trained_steps is not None:
            warnings.warn(f"guidance_scale {scale} on a student, which has guidance built in: 1 is right", stacklevel=3)

    def _timesteps(self, steps: int | None) -> Tensor:
        trained = self.config.trained_steps
        if steps is None:
            if trained is not None and len(trained) > 1:
                raise ValueError(f"num_inference_steps: choose one of {trained}, for which this student was trained")
            steps = TEACHER_STEPS if trained is None else trained[0]
        if trained is not None and steps not in trained:
            grids = " or ".join(f"{k} (timesteps {self._listed(self._grid(k))})" for k in trained)
            raise ValueError(
                f"num_inference_steps {steps}: this student was trained for {grids}; "
                f"leave num_inference_steps out, or distil a student for {steps}"
            )
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {steps}")
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        if trained is not None and self.scheduler.timesteps.tolist() != self._grid(steps):
            raise ValueError(
                f"{type(self.scheduler).__name__} goes through {self._listed(self.scheduler.timesteps.tolist())}, but "
                f"this student was trained on {self._listed(self._grid(steps))}; use the scheduler saved with it"
            )
        return self.scheduler.timesteps

    def _grid(self, steps: int) -> list[int]:
        """Evenly spaced from pure noise ("trailing"): four steps of a 1000-entry table are 999, 749, 499, 249."""
        n = self.scheduler.config.num_train_timesteps
        return [round(n * (steps - i) / steps) - 1 for i in range(steps)]

    @staticmethod
    def _listed(timesteps: Sequence[float]) -> str:
        return ", ".join(f"{t:g}" for t in timesteps)

    def _noise(
        self, n: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (n, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(f"generator must be one, or one per label; got {len(generator)} for {n} labels")
        # the state stays in float32 whatever the network's dtype: one rounding per evaluation, not one per step
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be noise of shape {shape}; got {tuple(latents.shape)}")
        return latents.to(self._execution_device, torch.float32)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return self.unet(x.to(self.unet.dtype), t, class_labels=labels, return_dict=False)[0].float()
        both = torch.cat([labels, torch.full_like(labels, self.config.null_label)])
        output = self.unet(torch.cat([x, x]).to(self.unet.dtype), t, class_labels=both, return_dict=False)[0]
        cond, null = output.float().chunk(2)
        return null + scale * (cond - null)

    def _clean(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean image that the network's output stands for, at x (B, C, H, W) and timestep t."""
        alpha_bar = self.scheduler.alphas_cumprod[t.cpu()]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return output
        return (x - sigma * output) / alpha if kind == "epsilon" else alpha * x - sigma * output

    def _images(self, x: Tensor, output_type: str) -> object:
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)
