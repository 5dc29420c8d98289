"""A Flux2Pipeline of real classes, randomly initialised and told its guidance as dev is; and klein, which is not."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2Tokenizer,
)

from tests.tiny import qwen_image, z_image

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
"""Of messages in parts, as Pixtral's."""


def processor() -> PixtralProcessor:
    """One token per byte."""
    vocab = {symbol: i for i, symbol in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokens = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks)
    return PixtralProcessor(PixtralImageProcessor(), tokens, chat_template=CHAT)


def text_encoder(tokens: Qwen2Tokenizer) -> Mistral3ForConditionalGeneration:
    """The pipeline reads layers 10, 20 and 30, so there are as many."""
    text = {
        "model_type": "mistral", "vocab_size": len(tokens), "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
        "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 4, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=tokens.convert_tokens_to_ids("[IMG]"))
    ).eval()


def vae() -> AutoencoderKLFlux2:
    """Factor two between pixels and latents; patches with statistics of their own."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def transformer(**changes: Any) -> Flux2Transformer2DModel:
    """Two MM-DiT blocks and two single ones."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    return Flux2Transformer2DModel(**config | changes)


def pipeline(**changes: Any) -> Flux2Pipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    tokens = processor()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    made = Flux2Pipeline(scheduler, vae(), text_encoder(tokens.tokenizer), tokens, transformer(**changes))
    made.default_sample_size = 8
    return made


def klein() -> Flux2KleinPipeline:
    """The smaller sibling."""
    torch.manual_seed(0)
    tokens = qwen_image.tokenizer()
    encoder = z_image.text_encoder(tokens, num_hidden_layers=27, hidden_size=8)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    made = Flux2KleinPipeline(scheduler, vae(), encoder, tokens, transformer(guidance_embeds=False))
    made.default_sample_size = 8
    return made
