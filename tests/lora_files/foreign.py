"""Writers of the file forms that other programs make, for the reading tests.

Written from the table of key formats, not from `hyperlora_jax.lora_files.keys`: block by block,
with an explicit map for the LDM names of a UNet of two blocks and two layers.
"""

import numpy as np

BLOCKS_SD = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.attentions.1": "input_blocks.2.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm(path, upsampler_slot):
    if path == "up_blocks.0.upsamplers.0.conv":
        return f"output_blocks.2.{upsampler_slot}.conv"
    if path in BLOCKS_SD:
        return BLOCKS_SD[path]
    block = next(b for b in BLOCKS_SD if path.startswith(b + "."))
    inner = path.removeprefix(block + ".")
    return f"{BLOCKS_SD[block]}.{RESNET.get(inner, inner)}"


def stems(site, form, family):
    """(down key, up key, alpha key or None) of a site in a form."""
    xl = family == "sdxl"
    component = site.component
    path = site.path if component == "unet" else site.path.split(".", 1)[1]
    kohya_text = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    if form == "old" and component == "unet":
        if ".attn" in path:
            head, name = path.removesuffix(".0").rsplit(".", 1)
            stem = f"unet.{head}.processor.{name}_lora"
            return f"{stem}.down.weight", f"{stem}.up.weight", None
        return f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight", None
    if form == "old":
        if "self_attn" in path:
            head, name = path.rsplit(".", 1)
            stem = f"{component}.{head}.to_{name.split('_')[0]}_lora"
            return f"{stem}.down.weight", f"{stem}.up.weight", None
        stem = f"{component}.{path}.lora_linear_layer"
        return f"{stem}.down.weight", f"{stem}.up.weight", None
    if form == "diffusers5":
        stem = f"{component}.{path.removeprefix('text_model.')}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", None
    if component != "unet":
        stem = kohya_text[component] + path.replace(".", "_")
    elif form == "kohya":
        stem = "lora_unet_" + path.replace(".", "_")
    elif form == "kohya-ldm":
        stem = "lora_unet_" + ldm(path, 2 if xl else 1).replace(".", "_")
    elif form == "comfy":
        stem = "diffusion_model." + ldm(path, 2 if xl else 1)
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"
    elif form == "comfy-down":
        stem = "diffusion_model." + ldm(path, 2 if xl else 1)
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


FORMS = ("old", "diffusers5", "kohya", "kohya-ldm", "comfy", "comfy-down")


def random_tensors(spec, form, family, seed=0, dtype=np.float32, alphas=None):
    """(tensors, {path: delta as [fan_in, out] float64}). `alphas`: {path: number} or None."""
    random = np.random.default_rng(seed)
    tensors, deltas = {}, {}
    for site in spec:
        window = site.kernel_size if site.kind == "conv" else ()
        ones = (1, 1) if site.kind == "conv" else ()
        a = random.standard_normal((site.rank, site.in_features, *window)).astype(dtype)
        b = random.standard_normal((site.out_features, site.rank, *ones)).astype(dtype)
        down, up, alpha_key = stems(site, form, family)
        tensors[down], tensors[up] = a, b
        factor = 1.0
        if alphas and alpha_key and site.path in alphas:
            alpha = alphas[site.path]
            tensors[alpha_key] = alpha
            factor = float(np.reshape(alpha, -1)[0]) / site.rank
        flat_a = a.astype(np.float64).reshape(site.rank, -1)
        matrix = factor * (b.astype(np.float64).reshape(site.out_features, site.rank) @ flat_a)
        kernel = matrix.reshape(site.out_features, site.in_features, *window)
        order = (1, 0) if not window else (2, 3, 1, 0)
        deltas[site.path] = kernel.transpose(order).reshape(-1, site.out_features)
    return tensors, deltas
