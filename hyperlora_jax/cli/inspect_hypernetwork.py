"""`hyperlora inspect HYPERNETWORK`: what it writes, for which base, seen through which encoder."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.hypernet.hypernetwork import Stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and an encoder to compare."""
    parser.add_argument("path", help="folder of a hypernetwork")
    parser.add_argument(
        "--encoder", metavar="PATH", help="fail unless this is the encoder it was trained with"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the facts; needs no encoder."""
    from hyperlora_jax.hypernet.hypernetwork import read_stored

    stored = read_stored(args.path)
    for name, value in (*_facts(stored), *_encoder(stored, args.encoder)):
        print(f"{name:<12}{value}")
    return 0


def _facts(stored: "Stored") -> Iterator[tuple[str, str]]:
    import jax

    facts, spec = stored.config["facts"], stored.spec
    yield "kind", "hypernetwork"
    yield "parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(stored.params)):,}"
    yield "writes", f"{len(spec.sites)} sites, {spec.num_parameters:,} numbers a LoRA"
    yield "base", f"{facts.get('base')} ({str(facts.get('base_hash'))[:12]})"
    trained = len(facts.get("trained_on", ()))
    yield "trained", f"{facts.get('num_steps')} steps on {trained} subjects"
    yield "strength", f"{float(facts.get('default_strength', 1.0)):g}"


def _encoder(stored: "Stored", given: str | None) -> Iterator[tuple[str, str]]:
    from hyperlora_jax.encoders import stored_encoder

    record = stored.config["encoder"]
    yield "encoder", stored_encoder.titled(record)
    if "image_size" in record:
        height, width = record["image_size"]
        tokens = f"{record['num_tokens']} token(s) of {record['embedding_dim']} numbers"
        yield "", f"sees {height}x{width} pixels, gives {tokens}"
    if given is None and "path" in record:
        yield "", f"kept by path: {record['path']}"
    try:
        encoder = stored_encoder.find(stored.folder, record, given)
    except UserError as error:
        if given is not None:
            raise
        yield "", f"not at hand: {error}"
        return
    copy = stored.folder / stored_encoder.FOLDER
    if given is None and "path" not in record and copy.exists():
        size = sum(file.stat().length for file in copy.iterdir()) / 1e6
        yield "", f"kept with the checkpoint: {copy}, {size:,.1f} MB"
    else:
        yield "", f"found at {getattr(encoder, 'source', given)}, with that hash"
