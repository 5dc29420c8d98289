"""A SanaPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer


def gemma(width: int = 16) -> tuple[Gemma2Model, GemmaTokenizer]:
    """Two layers, one token per character."""
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(chr(c) for c in range(33, 127)), "\u2581"]
    tokens = GemmaTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(symbols), hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokens


def autoencoder() -> AutoencoderDC:
    """Factor four between pixels and latents."""
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.41, encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3, encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    ).eval()  # fmt: skip


def transformer(**changes: Any) -> SanaTransformer2DModel:
    """Three blocks; times scaled, and the prediction followed by a learned sigma."""
    config: dict[str, Any] = {
        "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 16, "sample_size": 8, "timestep_scale": 0.5, "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    return SanaTransformer2DModel(**config | changes)


def pipeline(**changes: Any) -> SanaPipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    encoder, tokens = gemma()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokens, encoder, autoencoder(), transformer(**changes), scheduler)
