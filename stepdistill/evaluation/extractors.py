"""Feature extractors from local weights: Inception, DINOv2, the bundled shapes classifier; ``clip`` has CLIP's.

Each is an ``ImageFeatures``: resize, scale, network. Its name carries all three, its hash identifies the weights, and
numbers from two names never share a column. Missing weights are one clear line; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill.evaluation import inception as inception_v3
from stepdistill.evaluation.features import check_images
from stepdistill.evaluation.resize import RESIZES, Resize, resize
from stepdistill.evaluation.weights import find_weights, load_state, sha256_of
from stepdistill.paths import project_dir
from stepdistill.shapes import SIZE

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
DINOV2_FOLDER = "dinov2-large"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of channels, of images in [0, 1]."""

InceptionResize = Literal["clean", "legacy_pytorch", "torchmetrics", "tensorflow"]


class ImageFeatures:
    """A network behind a resize and a scale: an ``Extractor``.

    Args:
        network: float32 (B, 3, size, size) -> (B, D), in eval mode, without gradients.
        name: of network and scale; resize and size are added to it.
        sha256: of the weights.
        dim: D.
        how: images reach the network's size; see ``resize``.
        size: of the network's images.
        mean: of channels, or of all of them, in levels 0..255.
        std: likewise.
        device: where the network runs; features come back to the CPU.
        batch_size: images per forward pass.

    Raises:
        ValueError: if the resize is unknown.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        name: str,
        sha256: str,
        dim: int,
        how: Resize,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ):
        if how not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {how!r}")
        self.network = network.to(device) if isinstance(network, nn.Module) else network
        self.name, self.sha256, self.dim, self.resize = f"{name}/{how}{size}", sha256, dim, f"{how}{size}"
        self.how, self.size, self.device, self.batch_size = how, size, device, batch_size
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) float32, on the CPU, of images uint8 (B, 3, H, W) of any size.

        Raises:
            ValueError: if the images break the contract, or have another size under resize "none".
        """
        check_images(images)
        parts = []
        for batch in images.split(self.batch_size):
            pixels = resize(batch.to(self.device), self.size, self.how)
            parts.append(self.network((pixels - self.mean) / self.std).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dim)


def inception(
    weights: str | PathLike[str] | None = None,
    how: InceptionResize = "clean",
    device: torch.device | str = "cpu",
    batch_size: int = 50,
) -> ImageFeatures:
    """The 2048 features of FID, under the resize and scale of one of the public implementations.

    Args:
        weights: ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid, torch-fidelity's file of the same state, or
            either as safetensors; None: that name in the folder ``STEPDISTILL_WEIGHTS``.
        how: whose numbers are wanted: "clean" (clean-fid), "legacy_pytorch" (pytorch-fid), "torchmetrics", or
            "tensorflow" (torch-fidelity).
        device: where it runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: if there are no weights; says which, and where to put them.
        ValueError: if they are of another network, or ``how`` is none of those.
    """
    if how not in ("clean", "legacy_pytorch", "torchmetrics", "tensorflow"):
        raise ValueError(f"FID is resized by clean, legacy_pytorch, torchmetrics or tensorflow; got {how!r}")
    what = "Inception weights (of pytorch-fid's and torch-fidelity's releases; sha256 begins with 6726825d)"
    path = find_weights(weights, INCEPTION_FILE, what)
    network = inception_v3.InceptionV3()
    _load(network, load_state(path), path, "FID's Inception", ignore=("fc.", "AuxLogits."))
    centre = 127.5 if how == "legacy_pytorch" else 128.0  # 2x - 1 of [0, 1], or TensorFlow's (x - 128) / 128
    return ImageFeatures(
        network,
        name="inception-2015",
        sha256=sha256_of(path),
        dim=inception_v3.FEATURES,
        how=how,
        size=inception_v3.SIZE,
        mean=[centre],
        std=[centre],
        device=device,
        batch_size=batch_size,
    )


def dinov2(
    weights: str | PathLike[str] | None = None,
    how: Resize = "pil",
    size: int = 224,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> ImageFeatures:
    """DINOv2's class token after the last norm, arXiv:2304.07193: the features of FD-DINOv2, arXiv:2306.04675.

    Args:
        weights: a folder of transformers' ``Dinov2Model`` (config.json, model.safetensors), ViT-L/14 for published
            numbers; None: the folder ``dinov2-large`` in ``STEPDISTILL_WEIGHTS``.
        how: "pil" is dgm-eval's default; "clean" is its clean resize.
        size: of the network's images.
        device: where it runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds another network.
    """
    from transformers import Dinov2Model  # takes its time

    path = find_weights(weights, DINOV2_FOLDER, "DINOv2 folder (facebook/dinov2-large on the Hugging Face hub)")
    network = from_folder(Dinov2Model, path)
    mean, std = IMAGENET
    return ImageFeatures(
        lambda x: network(pixel_values=x).last_hidden_state[:, 0],
        name=f"dinov2-{network.config.hidden_size}",
        sha256=sha256_of(path),
        dim=network.config.hidden_size,
        how=how,
        size=size,
        mean=[255 * v for v in mean],
        std=[255 * v for v in std],
        device=_placed(network, device),
        batch_size=batch_size,
    )


def shapes_classifier(device: torch.device | str = "cpu", batch_size: int = 500) -> ImageFeatures:
    """The bundled classifier of captioned shapes, (B, 128) of images of 32x32 pixels.

    Raises:
        FileNotFoundError: if stepdistill is installed without its repository.
    """
    from stepdistill.evaluation.shapes import FEATURES, load_shapes_classifier

    path = project_dir("assets") / "shapes-judges" / "classifier.safetensors"
    network = load_shapes_classifier(path).to(device)
    return ImageFeatures(
        network.features,
        name="shapes-classifier",
        sha256=sha256_of(path),
        dim=FEATURES,
        how="none",
        size=SIZE,
        mean=[127.5],
        std=[127.5],
        device=device,
        batch_size=batch_size,
    )


def from_folder(model_class: type, path: Path) -> nn.Module:
    """A transformers model of a local folder: float32, eval mode, no gradients, safetensors only.

    Raises:
        ValueError: if the folder does not hold such a model whole.
    """
    try:
        model, report = model_class.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no folder of a {model_class.__name__}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} tensors of a {model_class.__name__}, {missing[0]} among them")
    return model.eval().requires_grad_(False)


def _load(network: nn.Module, state: dict[str, Tensor], path: Path, what: str, ignore: tuple[str, ...]) -> None:
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not k.startswith(ignore)}
    wanted = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        has, wants = found.get(wrong[0]), wanted.get(wrong[0])
        raise ValueError(
            f"{path} is not {what}: {wrong[0]} has shape {has and tuple(has)}, expected {wants and tuple(wants)} "
            f"({len(wrong)} such tensors)"
        )
    network.load_state_dict(state, strict=False)  # strict but for counters of batches, which nothing reads
    network.eval().requires_grad_(False)


def _placed(network: nn.Module, device: torch.device | str) -> torch.device | str:
    network.to(device)
    return device
