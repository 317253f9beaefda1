"""One base, any number of LoRAs: runs an exported UNet whose LoRAs are inputs.

    python lora_unet.py --base BASE --lora anna.safetensors ben.safetensors \\
        --prompt "a portrait" --out DIR

draws one picture for each LoRA, all in one batch. It lies in the folder of the exported UNet and
needs torch, safetensors and diffusers, and onnxruntime where the graph is ONNX. From Python:

    unet = LoraUNet("FOLDER")
    unet.attach(pipe, [unet.vector("anna.safetensors"), unet.vector("ben.safetensors")])
    pipe(["a portrait"] * 2)
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ENDS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down",
        ".lora_up.weight": "up", ".alpha": "alpha"}  # fmt: skip
Layers = dict[str, dict[str, torch.Tensor]]  # {path: {"down", "up", "alpha"?}}


class BadInput(Exception):
    """What was given cannot be used; the message is one line."""


class LoraUNet:
    """An exported UNet. Tensors are on `device`, "cpu" or a GPU ("cuda:0")."""

    def __init__(self, folder: str | Path = Path(__file__).parent, device: str = "cpu"):
        self.folder, self.device = Path(folder), torch.device(device)
        try:
            self.layout = json.loads((self.folder / "lora.json").read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: no readable lora.json, expected an exported UNet") from error
        self.dtype = getattr(torch, self.layout["dtype"])
        self.sites = {site["path"]: site for site in self.layout["sites"]}
        graph = self.folder / self.layout["graph"]
        if graph.suffix == ".onnx":
            import onnxruntime

            kind = "CPU" if self.device.type == "cpu" else self.device.type.upper()
            self.session = onnxruntime.InferenceSession(
                graph, providers=[f"{kind}ExecutionProvider"]
            )
            self._run = self._run_onnx
        else:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(torch.export.load(graph), self.device)
            self._run = program.module()

    def vector(self, file: str | Path) -> torch.Tensor:
        """The flat LoRA [d] of a kohya, diffusers or PEFT file of this base.

        A lower rank and fewer layers than the graph takes are filled up with zeros, which changes
        nothing.

        Raises:
            BadInput: a layer, shape or rank that the graph does not take; no LoRA file.
        """
        flat = torch.zeros(self.layout["numbers"])
        for path, parts in _layers(Path(file), self.sites).items():
            if path not in self.sites:
                raise BadInput(
                    f"{file}: adapts {path}, the graph takes layers of {self.layout['preset']!r} "
                    f"of {self.layout['base']} only"
                )
            if missing := {"down", "up"} - parts.keys():
                raise BadInput(f"{file}: {path} has no {missing.pop()} factor")
            rank = parts["down"].shape[0]
            scale = float(parts["alpha"]) / rank if "alpha" in parts else 1.0
            for side, factor in (("down", parts["down"]), ("up", parts["up"] * scale)):
                self._place(flat, path, side, factor, file)
        return flat.to(self.device, self.dtype)

    def _place(
        self, flat: torch.Tensor, path: str, side: str, factor: torch.Tensor, file: str | Path
    ) -> None:
        start, shape = self.sites[path][side]["start"], self.sites[path][side]["shape"]
        axis = 0 if side == "down" else 1  # of the rank
        rank, sizes = factor.shape[axis], [n for n in factor.shape if n != 1]
        if rank > shape[axis]:
            raise BadInput(f"{file}: {path} has rank {rank}, the graph takes {shape[axis]}")
        fits = [*shape[:axis], rank, *shape[axis + 1 :]]
        if sizes != [n for n in fits if n != 1]:
            raise BadInput(
                f"{file}: LoRA of another base: {path}.{side} is {list(factor.shape)}, the graph "
                f"takes {fits}"
            )
        size = torch.Size(shape).numel()
        whole = flat[start : start + size].view(shape)
        whole.narrow(axis, 0, rank).copy_(factor.reshape(fits))

    def __call__(
        self, loras: torch.Tensor, strengths: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet predicts, [b, c, h, w], with the LoRA [b, d] and strength [b] of each row.

        Args:
            **inputs: `sample` [b, c, h, w], `timestep` [b], `encoder_hidden_states` [b, n, e]; of
                SDXL also `text_embeds` [b, p] and `time_ids` [b, 6].
        """
        inputs |= {"lora": loras, "strength": strengths}
        kinds = dict.fromkeys(inputs, self.dtype) | {"timestep": torch.float32}
        return self._run(
            **{
                name: value.to(self.device, kinds[name]).contiguous()
                for name, value in inputs.items()
            }
        )

    def _run_onnx(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Inputs and output stay where they are, on a GPU too."""
        binding, result = self.session.io_binding(), torch.empty_like(inputs["sample"])
        outs = {self.session.get_outputs()[0].name: result}
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outs)):
            for name, value in tensors.items():
                kind = str(value.dtype).removeprefix("torch.")
                where = value.device.type, value.device.index or 0
                bind(name, *where, kind, tuple(value.shape), value.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return result

    def attach(
        self,
        pipe: "DiffusionPipeline",
        loras: Sequence[torch.Tensor],
        strengths: Sequence[float] | None = None,
    ) -> None:
        """From now on the pipeline's pictures have these LoRAs [d], one for each picture of a call.

        diffusers asks for unguided rows of all pictures first, then for guided ones: both get the
        picture's LoRA.
        """
        strengths = [1.0] * len(loras) if strengths is None else strengths
        if len(strengths) != len(loras):
            raise BadInput(f"{len(strengths)} strengths for {len(loras)} LoRAs, expected one each")
        stacked, factors = torch.stack(list(loras)), torch.tensor(strengths, device=self.device)

        def forward(
            sample: torch.Tensor,
            timestep: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            timestep_cond: torch.Tensor | None = None,
            added_cond_kwargs: dict[str, torch.Tensor] | None = None,
            **others: object,
        ) -> tuple[torch.Tensor]:
            rows = len(sample)
            unknown = [n for n, x in others.items() if n != "return_dict" and x is not None]
            if unknown:
                raise BadInput(f"{unknown[0]}: the graph has no such input")
            if rows % len(stacked):
                raise BadInput(
                    f"{len(stacked)} LoRAs for a batch of {rows}, expected one a picture"
                )
            more = dict(added_cond_kwargs or {})
            if timestep_cond is not None:
                more["timestep_cond"] = timestep_cond
            noise = self(
                stacked.repeat(rows // len(stacked), 1),
                factors.repeat(rows // len(stacked)),
                sample=sample,
                timestep=timestep.expand(rows),
                encoder_hidden_states=encoder_hidden_states,
                **more,
            )
            return (noise.to(sample.dtype),)

        pipe.unet.forward = forward


def _layers(file: Path, sites: dict[str, dict]) -> Layers:
    """The factors of a file by the path of their layer."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file}: no readable .safetensors file ({error})") from error
    kohya = {site["kohya"]: path for path, site in sites.items()}
    layers: Layers = {}
    for key, value in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is None:
            raise BadInput(f"{file}: {key} belongs to no LoRA in kohya, diffusers or PEFT form")
        stem = re.sub(r"^(base_model\.model\.|unet\.)", "", key.removesuffix(end))
        layers.setdefault(kohya.get(stem, stem), {})[ENDS[end]] = value.float()
    if not layers:
        raise BadInput(f"{file}: holds no tensor, expected a LoRA")
    return layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; 2 for what cannot be used, with one line of why."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="diffusers directory of the exported base")
    parser.add_argument("--lora", metavar="FILE", nargs="+", required=True, help="a picture each")
    parser.add_argument("--strength", type=float, nargs="+", help="one for each LoRA; default: 1")
    parser.add_argument("--prompt", nargs="+", required=True, help="one for all, or one each")
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="DIR", required=True)
    given = parser.parse_args(arguments)
    try:
        draw(given)
    except BadInput as error:
        print(f"lora_unet: {error}", file=sys.stderr)
        return 2
    return 0


def draw(given: argparse.Namespace) -> None:
    """Writes a PNG for each LoRA."""
    unet = LoraUNet(device=given.device)
    loras = [unet.vector(file) for file in given.lora]
    prompts = given.prompt * (len(loras) if len(given.prompt) == 1 else 1)
    if len(prompts) != len(loras):
        raise BadInput(f"{len(prompts)} prompts for {len(loras)} LoRAs, expected one, or one each")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(given.base, torch_dtype=unet.dtype).to(unet.device)
    unet.attach(pipe, loras, given.strength)
    noise = [torch.Generator().manual_seed(given.seed) for _ in loras]
    images = pipe(
        prompts,
        num_inference_steps=given.num_steps,
        guidance_scale=given.guidance,
        generator=noise,
    ).images
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    for k, (file, image) in enumerate(zip(given.lora, images, strict=True)):
        image.save(out / f"{Path(file).stem}_{k:02d}.png")
    print(f"wrote {len(images)} pictures to {out}")


if __name__ == "__main__":
    sys.exit(main())
