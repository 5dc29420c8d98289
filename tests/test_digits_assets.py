"""The bundled digits teacher and classifier: the files, and what they can do, measured without the training code."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from stepdistill.data import Digits, load_digits
from stepdistill.evaluation.classifier import DigitClassifier, load_digit_classifier

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
MANIFEST = json.loads((ASSETS / "MANIFEST.json").read_text())


@pytest.fixture(scope="module")
def teacher() -> UNet2DModel:
    model, info = UNet2DModel.from_pretrained(ASSETS / "teacher" / "unet", output_loading_info=True)
    assert not any(info.values()), f"the file and the network differ: {info}"
    return model.eval().requires_grad_(False)


def x0_error(teacher: UNet2DModel, t: int, labels: torch.Tensor) -> float:
    """Root mean square error per pixel of the teacher's x0 on the held-out digits at table index t.

    The table is rebuilt here, so that a wrong schedule, sign or scaling in the bundled files cannot cancel out.
    """
    images = load_digits("heldout").images
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[t]
    alpha, sigma = alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(t))
    x_t = alpha * images + sigma * noise
    v = teacher(x_t, torch.tensor(t), class_labels=labels).sample
    return float((alpha * x_t - sigma * v - images).square().mean().sqrt())


def test_every_file_is_in_the_manifest_with_its_hash_and_size() -> None:
    found = {p.relative_to(ASSETS).as_posix(): p.read_bytes() for p in ASSETS.rglob("*") if p.is_file()}
    del found["MANIFEST.json"]
    assert found.keys() == MANIFEST["files"].keys()
    for name, data in found.items():
        entry = MANIFEST["files"][name]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"]), name


def test_all_files_together_stay_below_two_megabytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 2_000_000


def test_no_json_holds_a_path_of_the_machine_that_wrote_it() -> None:
    for path in ASSETS.rglob("*.json"):
        text = path.read_text()
        assert "_name_or_path" not in text, path
        assert '"/' not in text and ":\\" not in text, path


def test_the_manifest_states_figures_at_the_goal() -> None:
    """Frechet distances that a recipe is compared with; the bars are those of the benchmark's teacher."""
    figures = MANIFEST["figures_percent"]
    assert figures["fd"] < 0.25
    assert figures["pix"] < 0.8
    assert min(figures["precision"], figures["recall"], figures["coverage"]) > 90


def test_the_split_is_disjoint_complete_and_stratified() -> None:
    train, heldout, everything = (load_digits(split) for split in ("train", "heldout", "all"))
    assert (len(train.labels), len(heldout.labels)) == (1437, 360)
    assert everything.images.dtype == torch.float32 and everything.labels.dtype == torch.int64
    assert everything.images.shape == (1797, 1, 8, 8)
    assert (everything.images.min(), everything.images.max()) == (-1, 1)

    def rows(digits: Digits) -> set[tuple[int, bytes]]:
        return {
            (label, image.numpy().tobytes()) for label, image in zip(digits.labels.tolist(), digits.images, strict=True)
        }

    # No digit occurs twice in the data set, so sets of rows prove what they seem to.
    assert len(rows(everything)) == 1797
    assert not rows(train) & rows(heldout)
    assert rows(train) | rows(heldout) == rows(everything)
    shares = heldout.labels.bincount() / everything.labels.bincount()
    torch.testing.assert_close(shares, torch.full((10,), 360 / 1797), atol=0.004, rtol=0)


def test_the_split_never_changes() -> None:
    """A digit that moves from one part to the other would turn held-out figures into training figures."""
    digest = hashlib.sha256((load_digits("heldout").images * 8).to(torch.int8).numpy().tobytes()).hexdigest()
    assert digest == "197fd06d08eac59a7b490984735f5d491e2cf8200cb86614b3ac151e2f27c5bb"


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        load_digits("test")


def test_the_classifier_errs_at_most_once_on_held_out_digits() -> None:
    digits = load_digits("heldout")
    classifier = load_digit_classifier(ASSETS / "classifier.safetensors")
    errors = int((classifier(digits.images).argmax(1) != digits.labels).sum())
    assert errors <= 1  # 99.7 %
    assert 100 * (1 - errors / 360) == pytest.approx(MANIFEST["figures_percent"]["heldout_accuracy"], abs=1e-3)


def test_the_classifiers_features_feed_its_logits() -> None:
    images = load_digits("heldout").images
    classifier = load_digit_classifier(ASSETS / "classifier.safetensors")
    features = classifier.features(images)
    assert features.shape == (360, 64)
    torch.testing.assert_close(classifier(images), features @ classifier.head.weight.T + classifier.head.bias)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "shape", "extra"])
def test_a_damaged_classifier_file_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    good, path = ASSETS / "classifier.safetensors", tmp_path / "classifier.safetensors"
    state = load_file(good)
    if damage == "truncated":
        path.write_bytes(good.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "shape":
        save_file(state | {"head.bias": torch.zeros(11)}, path)
    elif damage == "extra":
        save_file(state | {"more": torch.zeros(1)}, path)
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError) as caught:
        load_digit_classifier(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_fresh_classifier_matches_the_bundled_one_in_shape() -> None:
    state = load_file(ASSETS / "classifier.safetensors")
    assert {name: weight.shape for name, weight in DigitClassifier().state_dict().items()} == {
        name: weight.shape for name, weight in state.items()
    }
    assert all(weight.dtype == torch.float32 for weight in state.values())


def test_the_pipeline_folder_names_what_the_pipeline_needs() -> None:
    index = json.loads((ASSETS / "teacher" / "model_index.json").read_text())
    assert index["_class_name"] == ["class_conditional", "ClassConditionalPipeline"]
    assert (index["null_label"], index["trained_steps"]) == (10, None)
    scheduler = DDIMScheduler.from_pretrained(ASSETS / "teacher" / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.final_alpha_cumprod) == 1.0
    assert not scheduler.config.clip_sample


# Measured, plus 4 to 8 %; the mean digit has 0.54 at every t, the mean digit of the class 0.42.
@pytest.mark.parametrize(("t", "bound"), [(20, 0.058), (100, 0.17), (200, 0.265), (500, 0.43), (999, 0.45)])
def test_the_teacher_denoises_digits_it_never_saw(t: int, bound: float, teacher: UNet2DModel) -> None:
    assert x0_error(teacher, t, load_digits("heldout").labels) < bound


def test_the_teacher_reads_its_labels(teacher: UNet2DModel) -> None:
    """At t=999 the label is all there is: the right one must beat the null label, and that one a wrong one."""
    labels = load_digits("heldout").labels
    right, wrong = x0_error(teacher, 999, labels), x0_error(teacher, 999, (labels + 1) % 10)
    null = x0_error(teacher, 999, torch.full_like(labels, 10))
    assert right < 0.95 * null < 0.95 * wrong
