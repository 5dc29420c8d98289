"""CLIP of open_clip and transformers, and DINOv2, from local folders; against the libraries' own calls."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from stepdistill.evaluation.clip import agreement, open_clip_model, transformers_clip
from stepdistill.evaluation.extractors import dinov2
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.shapes import load_judges
from stepdistill.paths import project_dir
from stepdistill.shapes import captions, draw

JUDGES = project_dir("assets") / "shapes-judges"


@pytest.fixture(scope="module")
def scenes():
    drawn = draw(40, 77)
    return drawn.images, list(captions(drawn.attributes, 77, 0.0).texts)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIPModel with a tokenizer of bytes and a scale of its own."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = side | {"vocab_size": 260, "max_position_embeddings": 12, "eos_token_id": 257, "bos_token_id": 256}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=side | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(i) for i in range(97, 123)]
    vocab = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocab |= {"<|startoftext|>": 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, image_mean=[0.3, 0.4, 0.5]).save_pretrained(folder)
    return folder


# open_clip


def test_open_clip_scores_are_those_of_the_bundled_judge(scenes):
    images, texts = scenes
    clip = open_clip_model(JUDGES / "clip", batch_size=16)
    expected = load_judges().clip_scores(images.float() / 127.5 - 1, texts)
    torch.testing.assert_close(clip.scores(images, texts), expected, rtol=1e-4, atol=1e-3)
    assert clip.scores(images, texts).mean() > 70 > clip.scores(images, texts[1:] + texts[:1]).mean()
    assert clip.images(images).norm(dim=1).allclose(torch.ones(40)) and clip.images.dim == 64
    assert clip.images.name == "open_clip-clip/pil32" and clip.images.resize == "pil32"


def test_open_clip_file_with_its_architecture(tmp_path):
    """A file and open_clip's name of its network give what the folder gives, apart from the folder's own scale."""
    import open_clip

    config = json.loads((JUDGES / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    (tmp_path / "tiny-shapes.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-shapes.json")
    file = tmp_path / "w.safetensors"
    shutil.copy(JUDGES / "clip" / "open_clip_model.safetensors", file)
    clip = open_clip_model(file, architecture="tiny-shapes", how="clip")
    x = torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    scaled = ((99 / 255 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = F.normalize(load_judges().clip.encode_image(scaled), dim=1)
    torch.testing.assert_close(clip.images(x), expected, rtol=1e-4, atol=1e-5)


def test_agreement_is_a_hundred_times_the_cosine():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, -1.0]])
    assert agreement(a, b).tolist() == pytest.approx([100, 0, -100], abs=1e-4)  # below 0 it is not clamped


def test_bad_open_clip_models_are_named(tmp_path, scenes):
    images, texts = scenes
    with pytest.raises(ValueError, match="40 images, 39 prompts"):
        open_clip_model(JUDGES / "clip").scores(images, texts[:-1])
    with pytest.raises(ValueError, match="a folder, or a file with its architecture"):
        open_clip_model(JUDGES / "clip", architecture="ViT-B-32")
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a safetensors file"):
        open_clip_model(tmp_path / "weights.pt", architecture="ViT-B-32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no open_clip model"):
        open_clip_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="open_clip folder or safetensors file at nowhere"):
        open_clip_model("nowhere")


# transformers


def test_transformers_clip_is_the_models_own_logits(clip_folder):
    """Against CLIPModel's forward with its own processor, which returns logits scaled by a learned temperature."""
    clip = transformers_clip(clip_folder)
    images = torch.randint(0, 256, (3, 3, 20, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    prompts = ["a red ball", "cat", "two dogs and more words than the tokenizer has places for them"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], **tokens)
    expected = 100 * out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(clip.scores(images, prompts), expected.detach(), rtol=1e-3, atol=1e-2)
    assert clip.images.dim == 8 and clip.images.resize == "clip16"
    assert transformers_clip(clip_folder, how="cmmd").images.name.endswith("/cmmd16")


def test_torchmetrics_clip_score_is_why_ours_is_our_own(clip_folder):
    """With transformers 5 torchmetrics 1.9 cannot take the features' output; when it can, this test says so."""
    import transformers
    from torchmetrics.functional.multimodal import clip_score

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 still returns tensors")
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)

    def processor(text=None, images=None, return_tensors="pt", padding=True):
        tokens = tokenizer(text, return_tensors="pt", padding=True) if text else {}
        return {**tokens, "pixel_values": torch.zeros(1, 3, 16, 16)}

    with pytest.raises(AttributeError, match="norm"):
        clip_score(torch.zeros(1, 3, 16, 16), ["a cat"], model_name_or_path=lambda: (model, processor))


def test_bad_transformers_folders_are_named(tmp_path, clip_folder):
    with pytest.raises(FileNotFoundError, match="clip-vit-large-patch14-336 on the Hugging Face hub"):
        transformers_clip(tmp_path / "absent")
    with pytest.raises(ValueError, match="is no folder of a CLIPModel"):
        transformers_clip(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, bare / name)
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        transformers_clip(bare)


# DINOv2


def test_dinov2_is_the_class_token_at_imagenets_scale(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "tiny")
    extractor = dinov2(tmp_path / "tiny", size=28)
    x = to_uint8(torch.rand(2, 3, 28, 28) * 2 - 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path / "tiny").eval()((x / 255 - mean) / std).pooler_output
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-5)
    assert (extractor.name, extractor.dim, extractor.resize) == ("dinov2-24/pil28", 24, "pil28")
    with pytest.raises(FileNotFoundError, match="facebook/dinov2-large"):
        dinov2(tmp_path / "absent")
    with pytest.raises(ValueError, match="images must be uint8"):
        extractor(x.float())


def test_a_folder_of_another_network_is_refused(clip_folder):
    with pytest.raises(ValueError, match="Dinov2Model"):
        dinov2(clip_folder)
