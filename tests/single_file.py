"""Writes a diffusers pipeline as one file in Stable Diffusion's own layout: the inverse of what diffusers does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
UNET_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
UNET_NAMES |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_ENDS |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_NAMES = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
CLIP_NAMES |= {"self_attn.out_proj": "attn.out_proj"}
CLIP_ENDS = {"embeddings.token_embedding.weight": "token_embedding.weight"}
CLIP_ENDS |= {"embeddings.position_embedding.weight": "positional_embedding"}
CLIP_ENDS |= {"final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}


def original_unet(state_dict: Tensors, layers_per_block: int) -> Tensors:
    """Input blocks are counted through, a downsampler is one; an upsampler belongs to the layer before it."""
    tensors, rows = {}, layers_per_block + 1
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.*)", key)
        if match is None:
            name, _, end = key.rpartition(".")
            tensors[f"{UNET_ENDS[name]}.{end}"] = tensor
            continue
        where, kind, rest = match[1], match[3], match[5]
        block, layer = int(match[2] or 0), int(match[4])
        if kind == "resnets":
            part, _, last = rest.rpartition(".")
            rest = f"{UNET_NAMES[part]}.{last}"
        place = int(kind == "attentions")
        if where == "mid":
            new = f"middle_block.{2 * layer + place}"
        elif kind == "downsamplers":
            new, rest = f"input_blocks.{(block + 1) * rows}.0", rest.replace("conv", "op")
        elif kind == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in state_dict)
            new = f"output_blocks.{(block + 1) * rows - 1}.{1 + attends}"
        else:
            side, first = ("input", 1) if where == "down" else ("output", 0)
            new = f"{side}_blocks.{first + block * rows + layer}.{place}"
        tensors[f"{new}.{rest}"] = tensor
    return tensors


def original_vae(state_dict: Tensors, blocks: int) -> Tensors:
    tensors = {}
    for key, tensor in state_dict.items():
        new = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in VAE_NAMES.items():
                new = new.replace(f".{ours}.", f".{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        tensors[new] = tensor
    return tensors


def original_open_clip(state_dict: Tensors) -> Tensors:
    """Queries, keys and values are one matrix there, and the projection is transposed."""
    tensors: Tensors = {}
    state_dict = {key.removeprefix("text_model."): tensor for key, tensor in state_dict.items()}
    for key, tensor in state_dict.items():
        if key == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        elif key in CLIP_ENDS:
            tensors[CLIP_ENDS[key]] = tensor
        elif ".q_proj." in key:
            block = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key)
            parts = [state_dict[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            tensors[f"transformer.resblocks.{block[1]}.attn.in_proj_{block[2]}"] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            for ours, theirs in CLIP_NAMES.items():
                key = key.replace(ours, theirs)
            tensors[key.replace("encoder.layers", "transformer.resblocks")] = tensor
    return tensors


def write_single_file(pipeline: DiffusionPipeline, path: Path, open_clip: bool = False) -> Path:
    """open_clip: the first text encoder as Stable Diffusion 2 has it."""
    xl = hasattr(pipeline, "text_encoder_2")
    clip = {f"transformer.text_model.{key}": value for key, value in pipeline.text_encoder.state_dict().items()}
    if open_clip:
        clip = {f"model.{key}": value for key, value in original_open_clip(pipeline.text_encoder.state_dict()).items()}
    parts = {"conditioner.embedders.0" if xl else "cond_stage_model": clip}
    if xl:
        parts["conditioner.embedders.1.model"] = original_open_clip(pipeline.text_encoder_2.state_dict())
    unet, vae = pipeline.unet, pipeline.vae
    parts["model.diffusion_model"] = original_unet(unet.state_dict(), unet.config.layers_per_block)
    parts["first_stage_model"] = original_vae(vae.state_dict(), len(vae.config.block_out_channels))
    tensors = {f"{prefix}.{key}": tensor.contiguous() for prefix, part in parts.items() for key, tensor in part.items()}
    save_file(tensors, path)
    return path
