"""Tokenizers, and the text encoders of both teachers."""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from shapes_parts.loop import Plan, Trained, train
from shapes_parts.losses import attribute_loss, split_heads
from stepdistill.shapes import ABSENT, HEADS, captions, draw, random_attributes

T5 = Plan("t5", steps=1500, lr=2e-3, ema=0.99)
CONTEXT = 16
NEGATIVES = ("blurry", "low quality", "bad quality", "ugly", "noisy", "deformed", "out of focus", "two shapes", "empty")
WIDTH, LAYERS, HEADS_TEXT, MLP = 96, 3, 4, 4
EMBED = 64


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in CLIP's order of ids: one token for each word of the captions, bytes for the rest."""
    texts = captions(draw(20_000, 5).attributes, 5).texts + [f"{text}, {text}" for text in NEGATIVES] * 50
    empty = CLIPTokenizer()._tokenizer
    trained = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    alphabet = sorted(_byte_letters())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in _merges(trained)]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    # The two specials last: open_clip takes the text's state at the greatest id.
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def _byte_letters() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE."""
    return ByteLevel.alphabet()


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def clip_ids(texts: list[str]) -> Tensor:
    """Token ids (N, 16), padded with the end token."""
    return clip_tokenizer()(
        texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids


def clip_config() -> dict:
    """Open_clip's model configuration."""
    return {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 96, "head_width": 24, "patch_size": 4, "mlp_ratio": 3.0},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(clip_tokenizer()),
            "hf_tokenizer_name": "shapes",  # any name: the files of the folder are taken
            "width": WIDTH,
            "heads": HEADS_TEXT,
            "layers": LAYERS,
            "mlp_ratio": float(MLP),
            "pool_type": "argmax",
        },
    }


def make_clip() -> CLIP:
    """A new open_clip model of about 0.8 M parameters."""
    config = clip_config()
    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def text_config() -> CLIPTextConfig:
    """The text tower as transformers describes it."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * MLP,
        projection_dim=EMBED,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS_TEXT,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_encoder(clip: CLIP, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The open_clip text tower as a transformers model, with its projection (SD3) or without (SD)."""
    state = {
        "embeddings.token_embedding.weight": clip.token_embedding.weight,
        "embeddings.position_embedding.weight": clip.positional_embedding,
        "final_layer_norm.weight": clip.ln_final.weight,
        "final_layer_norm.bias": clip.ln_final.bias,
    }
    for index, block in enumerate(clip.transformer.resblocks):
        layer = f"encoder.layers.{index}."
        parts = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2}
        parts |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj, "self_attn.out_proj": block.attn.out_proj}
        for name, part in parts.items():
            state |= {f"{layer}{name}.weight": part.weight, f"{layer}{name}.bias": part.bias}
        for name, weight, bias in zip(
            "qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        ):
            state |= {f"{layer}self_attn.{name}_proj.weight": weight, f"{layer}self_attn.{name}_proj.bias": bias}
    state = {name: value.detach().clone() for name, value in state.items()}
    if projected:
        state = {f"text_model.{name}": value for name, value in state.items()}
        state["text_projection.weight"] = clip.text_projection.detach().T.contiguous()
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(text_config())
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def save_clip(clip: CLIP, folder: Path) -> None:
    """A folder for ``open_clip.create_model("local-dir:FOLDER")``."""
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": clip_config(), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.contiguous().half() for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


T5_WIDTH = 2 * WIDTH  # joint width of the SD3 teacher: both CLIP encoders side by side
T5_LENGTH = 16


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """Unigram over whole words of the captions and single characters."""
    words = sorted({word for text in captions(draw(20_000, 5).attributes, 5).texts for word in text.split()})
    words += sorted({word for text in NEGATIVES for word in text.split()} - set(words))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in words]
    pieces += [(letter, -10.0) for letter in ["▁", *string.ascii_lowercase, *string.digits, ",", ".", "-", "'"]]
    pieces += [(f"▁{letter}", -9.0) for letter in string.ascii_lowercase if f"▁{letter}" not in dict(pieces)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def t5_ids(texts: list[str]) -> Tensor:
    """Token ids (N, 16), padded as the SD3 pipeline pads them."""
    return t5_tokenizer()(
        texts, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def make_t5() -> T5EncoderModel:
    """One layer, as wide as the SD3 teacher's joint attention takes it."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
    )
    return T5EncoderModel(config)


class Reader(nn.Module):
    """A T5 encoder and a read-out of what its mean state says of the caption; the read-out serves training only."""

    def __init__(self) -> None:
        super().__init__()
        self.t5 = make_t5()
        self.read = nn.Linear(T5_WIDTH, sum(map(len, HEADS.values())))


def train_t5() -> Trained:
    """Tell the attributes that a caption names."""

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, Reader)
        attributes = random_attributes(64, generator)
        told = captions(attributes, step, 0.2)
        states = model.t5(t5_ids(told.texts)).last_hidden_state
        logits = split_heads(model.read(states.mean(1)))
        return {"loss": attribute_loss(logits, attributes.masked_fill(~told.named, ABSENT))}

    return train(T5, Reader, loss)
