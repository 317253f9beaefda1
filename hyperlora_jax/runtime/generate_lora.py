"""Reference pictures → LoRA of Stable Diffusion, in PyTorch, with the files beside this one.

    python generate.py --reference anna.jpg --out anna.safetensors

    hyper = LoraGenerator("FOLDER", "cuda")
    vectors, familiarity = hyper.generate([["anna.jpg"], ["ben1.jpg", "ben2.jpg"]])
    hyper.save("anna.safetensors", hyper.matrices(vectors[0]), "diffusers")
    applied = Applied(pipe.unet, hyper, hyper.matrices(vectors[0]))  # without a file; .set, .remove

A LoRA is a vector [d]: for each of the config's sites the down matrix (rank, in[, kh, kw]) and the
up matrix (out, rank), row by row. Seeds give other LoRAs than in JAX, the same noise the same ones.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor, nn

Given = tuple[Tensor, Tensor]  # what is known of l subjects: pooled [l, e], tokens [l, n, e]
Tree = dict[str, Any]  # weights by name: of parts, of layers, at last {"weight": …, "bias": …}


class WrongInput(Exception):
    """One line: the file or argument, what was found, what was expected."""


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Whatever goes wrong inside is one line about a file."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise WrongInput(f"{what}: {reason}") from None


def read_picture(source: Any, size: Sequence[int]) -> np.ndarray:
    """[height, width, 3] in [0, 1] of a path, bytes or Pillow picture: upright, its centre."""
    with naming("picture" if isinstance(source, bytes | Image.Image) else source):
        data = io.BytesIO(source) if isinstance(source, bytes) else source
        image = ImageOps.exif_transpose(data if isinstance(data, Image.Image) else Image.open(data))
        if image.mode[0] == "I":  # gray of 16 bits, which Pillow would cut off at 255
            image = Image.fromarray(np.uint8(np.round(np.clip(image, 0, 65535) / 257)))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        (wide, high), (height, width) = image.size, size
        if min(wide, high) < 8:
            raise ValueError(f"has {wide}x{high} pixels, expected at least 8x8")
        wide = min(wide, max(1, round(high * width / height)))
        high = min(high, max(1, round(image.width * height / width)))
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        image = image.convert("RGB").crop((left, top, left + wide, top + high))
        # Means of whole blocks are exact; other factors need a filter against aliasing.
        whole = wide % width == 0 and high % height == 0
        how = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        return np.float32(image.resize((width, height), how)) / np.float32(255)


def norm(x: Tensor, eps: float = 1e-6, **layer: Tensor) -> Tensor:
    """LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], **layer, eps=eps)


def attention(w: Tree, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """Of x to a context, with many heads."""
    named = {"query": x, "key": context, "value": context}
    parts = (F.linear(y, **w[n]).unflatten(-1, (heads, -1)) for n, y in named.items())
    mixed = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in parts))
    return F.linear(mixed.transpose(1, 2).flatten(2), **w["out"])


def adapted(w: Tree, x: Tensor, modulator: Tensor) -> Tensor:
    """x + (x·Down)·Upᵀ of [l, n, c], the factors written by a modulator [l, e]."""
    hidden, width = F.silu(F.linear(modulator, **w["hidden"])), x.shape[-1]
    down = F.linear(hidden, **w["down"]).unflatten(1, (width, -1)) / width**0.5
    return x + x @ down @ F.linear(hidden, **w["up"]).unflatten(1, (width, -1)).transpose(1, 2)


def block(w: Tree, config: Tree, x: Tensor, told: tuple = (), context: Any = None) -> Tensor:
    """x + gate · part(norm(x) · (1 + scale) + shift) of [l, n, c]; adapters in its MLP."""
    parts = [name for name in ("self_attention", "cross_attention", "mlp") if name in w]
    numbers: Sequence[float | Tensor] = (0.0, 0.0, 1.0) * len(parts)
    if "modulation" in w:
        numbers = F.linear(F.silu(told[0]), **w["modulation"])[:, None].chunk(3 * len(parts), -1)
    for k, name in enumerate(parts):
        y = norm(x, config.get("layer_norm_eps", 1e-6), **w.get(f"norm_{name}", {}))
        y = y * (1 + numbers[3 * k + 1]) + numbers[3 * k]
        if name == "mlp":
            y = F.linear(y, **w["mlp"]["in"])
            y = adapted(w["early_adapter"], y, told[1]) if "early_adapter" in w else y
            name, options, sharp = config["activation"]
            y = getattr(F, name)(sharp * y, **options) / sharp
            y = adapted(w["late_adapter"], y, told[1]) if "late_adapter" in w else y
            y = F.linear(y, **w["mlp"]["out"])
        else:
            y = attention(w[name], y, context if k else y, config["num_heads"])
        x = x + numbers[3 * k + 2] * y
    return x


def conv_encoder(w: Tree, config: Tree, x: Tensor) -> Given:
    """Normalised pictures [b, 3, h, w] → pooled [b, e], tokens [b, n, e]."""
    normed = functools.partial(F.group_norm, num_groups=config["groups"], eps=1e-6)
    x = F.conv2d(x, **w["stem"], padding=1)
    for stage in range(1, config["num_stages"]):
        x = F.pad(F.silu(normed(x, **w[f"norm_{stage}"])), (0, 1, 0, 1))
        x = F.conv2d(x, **w[f"down_{stage}"], stride=2)
        for number in range(config["blocks"]):
            own = w[f"stage_{stage}_block_{number}"]
            y = F.conv2d(F.silu(normed(x, **own["norm_in"])), **own["conv_in"], padding=1)
            y = F.silu(normed(y, **own["norm_out"]))
            x = x + F.conv2d(y, **own["conv_out"], padding=1)
    x = F.silu(normed(x, **w["norm_last"])).flatten(2).transpose(1, 2)
    tokens = F.linear(x, **w["token_projection"])
    reduced = F.silu(F.linear(tokens, **w["pool_in"])).flatten(1)
    return norm(F.linear(reduced, **w["pool_out"])), norm(tokens)


def clip_encoder(w: Tree, config: Tree, x: Tensor) -> Given:
    """The same by a CLIP vision model."""
    patches = F.conv2d(x, **w["patches"], stride=config["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([w["first"].expand(x.shape[0], 1, -1), patches], 1) + w["positions"]
    x = norm(x, config["layer_norm_eps"], **w["norm_in"])
    for number in range(config["depth"]):
        x = block(w[f"block_{number}"], config, x)
    y = norm(x, config["layer_norm_eps"], **w["norm_out"])
    tokens = F.linear(y, **w["projection"]) if "projection" in w else x
    return (tokens if "projection" in w else y)[:, 0], tokens


def onnx_encoder(w: Tree, config: Tree, x: Tensor) -> Given:
    """The same by onnxruntime, of any ONNX file: its first outputs [b, e] and [b, n, e]."""
    with naming(w["file"]):
        if "session" not in w:
            from onnxruntime import InferenceSession

            w["session"] = InferenceSession(w["file"], providers=["CPUExecutionProvider"])
        pixels = (x if config["channels_first"] else x.permute(0, 2, 3, 1)).cpu().numpy()
        feeds = ({config["input"]: np.ascontiguousarray(one[None])} for one in pixels)
        runs = zip(*(w["session"].run(config["outputs"], feed) for feed in feeds), strict=True)
        pooled, *tokens = (torch.from_numpy(np.concatenate(parts)).to(x) for parts in runs)
        return pooled, tokens[0] if tokens else pooled[:, None]


def timed(w: Tree, time: Tensor) -> Tensor:
    """Embeddings [l, c] of times in [0, 1]."""
    angles = time[:, None] * w["frequencies"]
    features = torch.cat([angles.sin(), angles.cos()], -1)
    return F.linear(F.silu(F.linear(features, **w["time_in"])), **w["time_out"])


def token_network(w: Tree, config: Tree, given: Given, noisy: Tensor, time: Tensor) -> Tensor:
    """LoRA [l, d] of a transformer over tokens; some look at a noisy one and a time [l] too."""
    pooled, context = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) for y in given)
    x, told = w["embeddings"].expand(pooled.shape[0], -1, -1), F.linear(pooled, **w["pooled_in"])
    counts, parts = config["counts"], []  # of tokens in groups that write equally many numbers
    if "time_in" in w:
        parts = noisy[:, w["places"]].split(config["sizes"], 1)
        parts = [y.unflatten(1, (count, -1)) for y, count in zip(parts, counts, strict=True)]
        x = x + torch.cat([F.linear(y, **w[f"noise_{n}"]) for n, y in enumerate(parts)], 1)
        told = told + timed(w, time)
    told = F.linear(F.silu(told), **w["condition"])
    context = F.linear(context, **w["tokens_in"])
    for number in range(config["depth"]):
        x = block(w[f"block_{number}"], config, x, (told, told), context)
    shift, scale = F.linear(F.silu(told), **w["final"])[:, None].chunk(2, -1)
    x, outputs = norm(x, **w["norm"]) * (1 + scale) + shift, []
    for number, states in enumerate(x.split(counts, 1)):
        head = w[f"head_{number}"]
        if head["weight"].ndim == 3:  # one for each token
            y = torch.einsum("lnc,nwc->lnw", states, head["weight"]) + head["bias"]
        else:
            y = F.linear(states, **head)
        if parts:
            y = y + F.linear(F.silu(told), **w["gates"])[:, number, None, None] * parts[number]
        outputs.append(y.flatten(1))
    return w["centre"] + torch.cat(outputs, 1)[:, w["order"]]


def mlp_network(w: Tree, config: Tree, given: Any, noisy: Tensor, time: Any) -> Tensor:
    """[l, z] → [l, z]: linears, norms and blocks one after another, skips from "keep" to "up"."""
    x, skips, told = noisy[:, None], [], ()
    if given is not None:  # a denoiser, not a decoder
        condition = F.linear(F.silu(F.linear(given[0], **w["condition_in"])), **w["condition_out"])
        told = timed(w, time) + (0 if config["adapters"] else condition), condition
    for name in config["layers"]:
        if name == "keep":
            skips.append(x)
        elif name.startswith("norm"):
            x = norm(x, **w[name])
        elif "weight" in w[name]:
            x = torch.cat([x, skips.pop()], -1) if name.startswith("up") else x
            x = F.linear(x, **w[name])
        else:
            x = block(w[name], config, x, told)
    return x[:, 0]


class LoraGenerator(nn.Module):
    """Pictures → LoRAs. `forward` is what is exported to ONNX."""

    def __init__(self, folder: str | Path = Path(__file__).parent, device: str = "cpu"):
        super().__init__()
        file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        with naming(file):
            self.config: Tree = json.loads(file.read_bytes())
            if (found := self.config.get("format")) != (expected := "hyperlora-pytorch-1"):
                raise ValueError(f"found format {found!r}, expected {expected!r}")
        self.weights = tree = Tree(encoder={"file": str(Path(folder) / "encoder.onnx")})
        with naming(weights):
            for name, x in load_file(weights, device).items():
                *parents, last = name.split("/")
                node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, tree)
                node[last] = x.float() if x.is_floating_point() else x.long()

    def embed(self, pictures: Tensor) -> Given:
        """Of pictures [l, k, h, w, 3] in [0, 1], k of each subject."""
        w, config, lead = self.weights, self.config["encoder"], pictures.shape[:2]
        run = {"hyperlora": conv_encoder, "clip": clip_encoder, "onnx": onnx_encoder}
        x = ((pictures.flatten(0, 1) - w["mean"]) / w["std"]).permute(0, 3, 1, 2)
        pooled, tokens = run[config["kind"]](w["encoder"], config, x)
        return pooled.unflatten(0, lead).mean(1), tokens.unflatten(0, lead).flatten(1, 2)

    def write(self, given: Given, noise: Any = None) -> Tensor:
        """LoRAs [l, d]; of `noise` [l, 1 + s, z] the first is a sampler's start, s are added."""
        w, config = self.weights, self.config
        guidance, count, sampler = config["draw"].values()
        if config["generator"] == "closed":
            known = None if config["noise_size"] else w["embeddings"].T
            shares = noise[:, 0] if known is None else F.normalize(given[0], dim=1) @ known
            if "num_neighbours" in config:
                best, places = shares.topk(config["num_neighbours"], 1)
                best = F.softmax(best / config["temperature"], 1)
                shares = torch.zeros_like(shares).scatter(1, places, best)
            elif known is not None:
                shares = torch.exp((shares - 1.0) / config["temperature"])
            return w["lora"]["mean"] + guidance * shares @ w["lora"]["directions"]
        if guidance != 1 and not config["guided"]:
            raise WrongInput(f"guidance is {guidance}, expected 1: trained on known subjects alone")
        kind = {"tokens": token_network, "mlp": mlp_network}[config["network"]["kind"]]
        net = functools.partial(kind, w["network"], config["network"])

        def guided(run: Callable[[Given], Tensor]) -> Tensor:  # away from an unknown subject's
            unknown = run((0 * given[0], 0 * given[1])) if guidance != 1 else 0.0
            return unknown + guidance * (run(given) - unknown)

        def iterated(given: Given) -> Tensor:
            x = torch.zeros_like(w["network"]["centre"]).expand(given[0].shape[0], -1)
            for time in config["times"]:
                x = net(given, x, x.new_full(x.shape[:1], time))
            return x

        if config["generator"] == "iterative":
            return guided(iterated)
        if not 1 <= count <= config["max_steps"]:
            raise WrongInput(f"num_steps is {count}, expected 1 to {config['max_steps']}")
        x, table = noise[:, 0], w["steps"][sampler][count * (count - 1) // 2 :][:count]
        for number, (time, kept, moved, fresh) in enumerate(table.tolist(), 1):
            times = x.new_full(x.shape[:1], time)
            x = kept * x + moved * guided(lambda known, x=x, times=times: net(known, x, times))
            x = x + fresh * noise[:, number] if fresh else x
        x = mlp_network(w["vae"], config["vae"], None, x, None) if "vae" in w else x
        return x * w["lora"]["spread"] + w["lora"]["mean"]

    def forward(self, pictures: Tensor, noise: Any = None) -> tuple[Tensor, Tensor | None]:
        """LoRAs of strength 1; familiarity from 0, unlike all trained subjects, to 1, or None."""
        given, table, familiarity = self.embed(pictures), self.weights.get("familiarity"), None
        if table is not None:
            nearest = (F.normalize(given[0], dim=1) @ table["known"].T).amax(1, keepdim=True)
            familiarity = (table["typical"] <= nearest).float().mean(1)
        return self.write(given, noise), familiarity

    @torch.no_grad()
    def generate(self, subjects: Any, seed: int = 0, num_samples: int = 1) -> tuple[Tensor, list]:
        """Vectors [subjects · samples, d] of lists of pictures, all from one noise; familiarity."""
        config, loras, familiarity = self.config, [], []
        shape = num_samples, 1 + config["draw"]["num_steps"], config["noise_size"]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for own in subjects:
            seen = np.stack([read_picture(one, config["encoder"]["image_size"]) for one in own])
            pictures = torch.from_numpy(seen).to(self.weights["mean"])
            lora, known = self(pictures.expand(num_samples, *seen.shape), noise.to(pictures))
            loras.append(lora)
            familiarity.append(None if known is None else float(known[0]))
        return torch.cat(loras), familiarity

    def matrices(self, vector: Tensor, strength: float | None = None) -> list[tuple]:
        """(Down, up) of every site, in PyTorch's layout; the strength is in the latter."""
        shapes = [site[side] for site in self.config["sites"] for side in ("down", "up")]
        parts = vector.split([math.prod(shape) for shape in shapes])
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        strength = self.config["strength"] if strength is None else strength
        return [(down, strength * up) for down, up in zip(parts[::2], parts[1::2], strict=True)]

    def save(self, path: Any, lora: Any, form: str = "kohya", dtype: str = "float16", **texts: Any):
        """Writes `matrices` for "kohya" tools, "diffusers" or "peft", the header with `texts`."""
        if form not in (files := self.config["files"]):
            raise WrongInput(f"format {form!r}: this LoRA has none, expected one of {[*files]}")
        own, tensors, path = files[form], {}, Path(path)
        for name, (down, up) in zip(own["names"], lora, strict=True):
            # Both of one size, by a power of two, which is exact.
            peaks = [x.abs().max().item() for x in (down, up)]
            shift = math.log2(peaks[1] / peaks[0]) / 2 if all(peaks) else 0.0
            factor = 2.0 ** round(shift) if abs(shift) > 0.75 else 1.0
            scale = own["alpha"] / len(down) if own["alpha"] else 1
            for key, x in ((own["down"], down * factor), (own["up"], up / factor / scale)):
                x = x.to("cpu", getattr(torch, dtype)).contiguous()
                if not x.isfinite().all():
                    raise WrongInput(f"{name}: is not finite in {dtype}; nothing was written")
                tensors[f"{name}.{key}.weight"] = x
            tensors |= {f"{name}.alpha": torch.tensor(own["alpha"])} if own["alpha"] else {}
        header = own["header"] | {f"hyperlora.{key}": str(text) for key, text in texts.items()}
        start = 8 + int.from_bytes((data := save(tensors))[:8], "little")
        header[own["hash"]] = hashlib.sha256(data[start:]).hexdigest()
        folder = form == "peft" or (form == "diffusers" and not path.suffix)
        named = path.name + ".safetensors" * (path.suffix != ".safetensors")
        path = path / own["file"] if folder else path.with_name(named)
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if "adapter_config" in own:
                path.with_name("adapter_config.json").write_text(own["adapter_config"])
            partial = Path(f"{path}.partial")
            partial.write_bytes(save(tensors, header))
            return partial.replace(path)


class Applied:
    """A LoRA on a UNet of diffusers: every adapted layer adds its part."""

    def __init__(self, unet: nn.Module, hyper: LoraGenerator, lora: Any):
        with naming(f"UNet of another family than {hyper.config['family']}"):
            self.modules = [unet.get_submodule(site["path"]) for site in hyper.config["sites"]]
            for module, site in zip(self.modules, hyper.config["sites"], strict=True):
                if (found := [*module.weight.shape[:2]]) != [site["up"][0], site["down"][1]]:
                    raise ValueError(f"found {found} at {site['path']}")
        self.set(lora)
        self.hooks = [module.register_forward_hook(self._add) for module in self.modules]

    def set(self, lora: Any) -> None:
        """Puts another LoRA in its place: `matrices` of it."""
        pairs = ([x.to(m.weight) for x in pair] for m, pair in zip(self.modules, lora, strict=True))
        self.factors = dict(zip(self.modules, pairs, strict=True))

    def remove(self) -> None:
        """Leaves the UNet as it was."""
        for hook in self.hooks:
            hook.remove()

    def _add(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = self.factors[module]
        if down.ndim == 2:
            return output + F.linear(F.linear(given[0], down), up)
        return output + F.conv2d(F.conv2d(given[0], down, None, module.stride, module.padding), up)


def main() -> int:
    """Writes the LoRA of one subject's pictures."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=main.__doc__)
    parser.add_argument("--reference", metavar="IMG", nargs="+", required=True)
    parser.add_argument("--out", metavar="FILE", required=True)
    parser.add_argument("--format", choices=("kohya", "diffusers", "peft"), default="kohya")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--strength", type=float, help="default: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    try:
        args = parser.parse_args()
        hyper = LoraGenerator(device=args.device)
        vectors, (known,) = hyper.generate([args.reference], args.seed)
        strength = hyper.config["strength"] if args.strength is None else args.strength
        texts = {"seed": args.seed, "strength": strength, "sample": 0}
        texts |= {} if known is None else {"familiarity": f"{known:.3f}"}
        hashes = (hashlib.sha256(Path(file).read_bytes()).digest() for file in args.reference)
        texts["reference_hash"] = hashlib.sha256(b"".join(hashes)).hexdigest()
        lora = hyper.matrices(vectors[0], strength)
        file = hyper.save(args.out, lora, args.format, args.dtype, **texts)
    except WrongInput as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file} (strength {strength:g}, familiarity {texts.get('familiarity', '?')})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
