"""Denoisers and autoencoders by their authors' names, made of diffusers' own, as single files have them."""

from __future__ import annotations

import re

import torch

Tensors = dict[str, torch.Tensor]


def _renamed(tensors: Tensors, rules: list[tuple[str, str]]) -> Tensors:
    """Each name by the first rule (pattern, replacement) that matches all of it."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = next(re.sub(f"^{old}$", new, name) for old, new in rules if re.fullmatch(old, name))
        found[new] = tensor
    return found


def _fused(tensors: Tensors, parts: tuple[str, ...], whole: str) -> Tensors:
    """Rows of all tensors whose names hold one of `parts` put together, under a name with `whole` in its place."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        part = next((part for part in parts if part in name), None)
        if part == parts[0]:
            tensor, name = torch.cat([tensors[name.replace(part, each)] for each in parts]), name.replace(part, whole)
        elif part:
            continue
        found[name] = tensor
    return found


def _swapped(tensors: Tensors, name: str) -> None:
    for kind in ("weight", "bias"):
        scale, shift = tensors[f"{name}.{kind}"].chunk(2)
        tensors[f"{name}.{kind}"] = torch.cat([shift, scale])


def flux(tensors: Tensors) -> Tensors:
    double = {n: t for n, t in tensors.items() if n.startswith("transformer_blocks.")}
    single = {n: t for n, t in tensors.items() if n.startswith("single_transformer_blocks.")}
    rest = {n: t for n, t in tensors.items() if n not in double and n not in single}
    double = _fused(double, ("attn.to_q.", "attn.to_k.", "attn.to_v."), "attn.img_qkv.")
    double = _fused(double, ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."), "attn.txt_qkv.")
    single = _fused(single, ("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."), "linear1.")
    found = _renamed(double, [
        (r"transformer_blocks\.(\d+)\.norm1\.linear\.(.*)", r"double_blocks.\1.img_mod.lin.\2"),
        (r"transformer_blocks\.(\d+)\.norm1_context\.linear\.(.*)", r"double_blocks.\1.txt_mod.lin.\2"),
        (r"transformer_blocks\.(\d+)\.attn\.(img|txt)_qkv\.(.*)", r"double_blocks.\1.\2_attn.qkv.\3"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.(.*)", r"double_blocks.\1.img_attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.(.*)", r"double_blocks.\1.txt_attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"double_blocks.\1.img_mlp.0.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"double_blocks.\1.img_mlp.2.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.(.*)", r"double_blocks.\1.txt_mlp.0.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.(.*)", r"double_blocks.\1.txt_mlp.2.\2"),
    ])  # fmt: skip
    found |= _renamed(single, [
        (r"single_transformer_blocks\.(\d+)\.norm\.linear\.(.*)", r"single_blocks.\1.modulation.lin.\2"),
        (r"single_transformer_blocks\.(\d+)\.linear1\.(.*)", r"single_blocks.\1.linear1.\2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"single_transformer_blocks\.(\d+)\.proj_out\.(.*)", r"single_blocks.\1.linear2.\2"),
    ])  # fmt: skip
    _swapped(rest, "norm_out.linear")
    return found | _renamed(rest, [
        (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"time_in.in_layer.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"time_in.out_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"vector_in.in_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"vector_in.out_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_1\.(.*)", r"guidance_in.in_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_2\.(.*)", r"guidance_in.out_layer.\1"),
        (r"context_embedder\.(.*)", r"txt_in.\1"),
        (r"x_embedder\.(.*)", r"img_in.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
    ])  # fmt: skip


def sd3(tensors: Tensors) -> Tensors:
    """SD3.5 medium's: with norms of q and k, and a second attention in some blocks."""
    tensors = _fused(dict(tensors), ("attn.to_q.", "attn.to_k.", "attn.to_v."), "attn.x_qkv.")
    tensors = _fused(tensors, ("attn2.to_q.", "attn2.to_k.", "attn2.to_v."), "attn2.x_qkv.")
    tensors = _fused(tensors, ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."), "attn.context_qkv.")
    _swapped(tensors, "norm_out.linear")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    _swapped(tensors, f"transformer_blocks.{last}.norm1_context.linear")
    block = r"transformer_blocks\.(\d+)\."
    return _renamed(tensors, [
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"y_embedder.mlp.0.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"y_embedder.mlp.2.\1"),
        (r"context_embedder\.(.*)", r"context_embedder.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
        (block + r"norm1\.linear\.(.*)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
        (block + r"norm1_context\.linear\.(.*)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
        (block + r"attn\.(x|context)_qkv\.(.*)", r"joint_blocks.\1.\2_block.attn.qkv.\3"),
        (block + r"attn2\.x_qkv\.(.*)", r"joint_blocks.\1.x_block.attn2.qkv.\2"),
        (block + r"(attn2?)\.norm_(q|k)\.weight", r"joint_blocks.\1.x_block.\2.ln_\3.weight"),
        (block + r"attn\.norm_added_(q|k)\.weight", r"joint_blocks.\1.context_block.attn.ln_\2.weight"),
        (block + r"(attn2?)\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.\2.proj.\3"),
        (block + r"attn\.to_add_out\.(.*)", r"joint_blocks.\1.context_block.attn.proj.\2"),
        (block + r"ff\.net\.0\.proj\.(.*)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
        (block + r"ff\.net\.2\.(.*)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
        (block + r"ff_context\.net\.0\.proj\.(.*)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
        (block + r"ff_context\.net\.2\.(.*)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
    ])  # fmt: skip


_RESNET = (
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection."),
)  # fmt: skip
_UNET = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}  # fmt: skip


def unet(tensors: Tensors, layers_per_block: int = 2) -> Tensors:
    """Of SD 1 to SDXL: each level has so many resnets going down, one more going up, and a change of size."""
    has_attention = {name[: name.index(".attentions")] for name in tensors if ".attentions." in name}
    level = layers_per_block + 1

    def renamed(name: str) -> str:
        if block := re.match(r"((down|up)_blocks\.(\d+))\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name):
            owner, way, number, kind, index = block[1], block[2], int(block[3]), block[4], int(block[5])
            rest = name[block.end() :]
            place = {"resnets": 0, "attentions": 1}.get(kind, 0)
            if kind == "downsamplers":
                index, rest = layers_per_block, rest.replace("conv.", "op.")
            elif kind == "upsamplers":
                index, place = layers_per_block, 2 if owner in has_attention else 1
            at = number * level + index + (1 if way == "down" else 0)
            name = f"{'input' if way == 'down' else 'output'}_blocks.{at}.{place}.{rest}"
        else:
            kind = "resnets" if ".resnets." in name else ""
            old = next(old for old in _UNET if name.startswith(old))
            name = name.replace(old, _UNET[old])
        for new, old in _RESNET if kind == "resnets" else ():
            name = name.replace(new, old)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def vae(tensors: Tensors) -> Tensors:
    """Of SD 1 to FLUX.1: attention by convolutions, levels of the decoder counted from below."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    rules = [
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."), (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."), (r"attn_1\.group_norm\.", "attn_1.norm."),
        (r"attn_1\.to_(q|k|v)\.", r"attn_1.\1."), (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    ]  # fmt: skip
    found: Tensors = {}
    for name, tensor in tensors.items():
        if up := re.match(r"decoder\.up_blocks\.(\d+)\.", name):
            rest = name[up.end() :].replace("resnets.", "block.").replace("upsamplers.0.", "upsample.")
            name = f"decoder.up.{levels - 1 - int(up[1])}.{rest}"
        for old, new in rules:
            name = re.sub(old, new, name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensor = tensor[:, :, None, None]
        found[name] = tensor
    return found
