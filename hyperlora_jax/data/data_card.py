"""The README.md that every LoRA-target dataset carries."""

import json
from collections.abc import Mapping

_CARD = """# LoRA targets

{total} subjects ({splits}). {loras}

| | |
|---|---|
| format | {format} (TFDS, ArrayRecord, uncompressed) |
| spec fingerprint | `{fingerprint}` |
| base model hash | `{base_hash}` |
| numbers per LoRA | {num_parameters:,} in {num_sites} layers, stored as {lora_dtype} |
| encoders | {encoders} |

Splits are by identity: no identity is in two of them.

## Reading it
```python
import tensorflow_datasets as tfds

source = tfds.builder_from_directory("THIS FOLDER").as_data_source(split="{first}")
example = source[0]{decode}
picture = PIL.Image.open(io.BytesIO(example["references"][0]))  # where there is one
```
or, with hyperlora_jax: `from hyperlora_jax.data.lora_targets import open_lora_targets`.

| field | content |
|---|---|
| `lora` | folded factors (delta = down · up, no alpha) as one vector: sites in spec order, lora_A \
(r, in) row by row, then lora_B (out, r) |
| `references`, `targets` | bytes of PNG files; every target has a caption |
| `embeddings/ENCODER` | one row per reference |
| `identity`, `seed`, `num_steps`, `loss_curve` | who is shown, and how the LoRA was fitted |

`metadata.json` holds the spec and the facts below, `index.json` the ids by split,
`whitening.safetensors` the element-wise mean and one standard deviation per factor matrix of the
training split.

## How it was made
```json
{facts}
```
"""


def text(metadata: Mapping) -> str:
    """The card of a dataset, from its metadata."""
    counts = metadata["num_subjects"]
    sites = json.loads(metadata["spec"])["sites"]
    # A site's row: path, in, out, rank, kind, kernel height and width, strides.
    numbers = sum(rank * (i * kh * kw + o) for _, i, o, rank, _, kh, kw, *_ in sites)
    bits = "\n# bfloat16 bits: (example['lora'].astype('uint32') << 16).view('float32')"
    return _CARD.format(
        total=sum(counts.values()),
        splits=", ".join(f"{split} {count}" for split, count in counts.items()),
        loras="Every subject has a LoRA." if sites else "Pictures only, no LoRAs.",
        format=metadata["format"],
        fingerprint=metadata["fingerprint"],
        base_hash=metadata["base_hash"] or "not recorded",
        num_parameters=numbers,
        num_sites=len(sites),
        lora_dtype=metadata["lora_dtype"],
        encoders=", ".join(f"{k} ({v})" for k, v in metadata["embedding_sizes"].items()) or "none",
        first=next(iter(counts)),
        decode=bits if metadata["lora_dtype"] == "bfloat16" else "",
        facts=json.dumps(metadata["facts"], indent=2, sort_keys=True),
    )
