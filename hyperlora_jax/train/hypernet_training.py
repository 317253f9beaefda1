"""`hyperlora train`: pictures (and LoRA targets) → hypernetwork.

    pictures ─► latents, text states, condition embeddings ─► training loop ─► WORKDIR/hypernetwork

The frozen models run once over all pictures; the result is kept in the workdir.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.data.encoded_subjects import EncodedSubjects, encode_subjects
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.data.pipelines import subject_batches
from hyperlora_jax.data.subject_pictures import load_pictures
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.conditioning import load_condition_encoder
from hyperlora_jax.hypernet.model import FOLDER, Hypernetwork, build_network
from hyperlora_jax.hypernet.objectives import ObjectiveWeights
from hyperlora_jax.parallel import sharding
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.stable_diffusion.embedded import image_size, load_base
from hyperlora_jax.train.hypernet_task import hypernet_task
from hyperlora_jax.train.loop import fit, open_workdir


def train_hypernetwork(config: Any, workdir: str | Path) -> Hypernetwork:
    """Trains as `configs/avatars.py` describes; writes and returns the hypernetwork.

    Raises:
        UserError: bad config values, a LoRA-target dataset of another base or spec, an unusable
            workdir; see also `train.loop.fit`.
    """
    workdir = Path(str(open_workdir(workdir)))
    mesh = make_mesh(**config.mesh)
    sd = load_base(config.base)
    encoder = load_condition_encoder(config.model.encoder)
    section, model = config.train, config.model.network.to_dict()
    spec = sd.lora_spec(config.model.preset, config.model.rank)
    net = build_network(spec, model)
    weights = _weights(section.objectives)
    encoded, pictures_facts = _encoded(config, workdir, sd, encoder)
    targets, subjects = _targets(config, workdir, weights, spec, sd.base_hash, encoded)
    facts = {
        "base": config.base,
        "base_hash": sd.base_hash,
        "family": family(sd),
        "spec": spec.fingerprint,
        "encoder": encoder.hash,
        "model": model,
        "data": pictures_facts,
    }
    shard, num_shards = sharding.host_shard(mesh)
    global_batch = section.batch_size * (mesh.shape["data"] * mesh.shape["fsdp"])
    batches = subject_batches(
        {"pooled": encoded.pooled, "tokens": encoded.tokens},
        {"latents": encoded.latents, "text_index": encoded.text_index},
        batch_size=global_batch if section.batch_per_device else section.batch_size,
        seed=section.seed,
        num_references=section.num_references,
        num_targets=section.images_per_subject,
        per_subject=targets,
        subjects=subjects,
        shard_index=shard,
        num_shards=num_shards,
    )
    task = hypernet_task(
        net,
        {"unet": sd.params["unet"], "text_states": encoded.text_states},
        batches,
        weights=weights,
        condition_shapes=(encoded.pooled.shape[2:], encoded.tokens.shape[2:]),
        unet=sd.unet,
        schedule=sd.schedule,
        min_snr_gamma=section.min_snr_gamma,
        facts=facts,
    )
    state = fit(
        task,
        workdir=workdir,
        mesh=mesh,
        seed=section.seed,
        num_steps=section.num_steps,
        optimizer=dict(section.optimizer),
        log_every_steps=section.log_every_steps,
        checkpoint_every_steps=section.checkpoint_every_steps,
        ema_decay=section.ema_decay,
        config=config.to_dict(),
    )
    params = jax.device_get(state.ema if state.ema is not None else state.params)
    stored = {**facts, "num_steps": section.num_steps, "trained_on": list(encoded.ids)}
    hyper = Hypernetwork(net, params, encoder, stored, model)
    if jax.process_index() == 0:
        hyper.save(workdir / FOLDER)
    return hyper


def family(sd: Any) -> str:
    """ "sd1", "sd2" or "sdxl": whose names a LoRA file for this base carries.

    A base of other sizes counts as the one whose building blocks it shares.
    """
    if sd.unet.settings.addition_time_width is not None:
        return "sdxl"
    return "sd2" if sd.unet.settings.use_linear_projection else "sd1"


def _weights(section: Any) -> ObjectiveWeights:
    try:
        return ObjectiveWeights(**dict(section))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.train.objectives: {error}") from error


def _encoded(
    config: Any, workdir: Path, sd: Any, encoder: Any
) -> tuple[EncodedSubjects, dict[str, Any]]:
    """Encoded training subjects, from the workdir if the same were encoded before."""
    pictures = load_pictures(
        config.data, config.data.num_identities, image_size(sd), workdir / "renders"
    )
    facts = dict(pictures.facts)
    asked = {"pictures": facts, "base": sd.base_hash, "encoder": encoder.hash, "layout": 1}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    file = workdir / f"encoded-{name}.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
        return EncodedSubjects(ids=tuple(map(str, stored.pop("ids"))), **stored), facts
    encoded = encode_subjects(
        sd,
        encoder,
        pictures.ids,
        pictures.images,
        pictures.captions,
        batch_size=config.train.encode_batch_size,
    )
    arrays = {k: v for k, v in vars(encoded).items() if k != "ids"}
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, ids=np.asarray(encoded.ids), **arrays)
    temporary.replace(file)
    return encoded, facts


def _targets(
    config: Any,
    workdir: Path,
    weights: ObjectiveWeights,
    spec: Any,
    base_hash: str,
    encoded: EncodedSubjects,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """LoRA vectors per subject where the objectives need them, and the subjects that have one."""
    if not (weights.delta or weights.whitened):
        return {}, None
    dataset = open_lora_targets(config.data.targets or workdir / "targets", spec, base_hash)
    number = {name: k for k, name in enumerate(encoded.ids)}
    rows = [int(i) for i in dataset.split_indices("train") if dataset.ids[int(i)] in number]
    if not rows:
        raise UserError(
            f"{dataset.path}: none of its {len(dataset)} subjects is among the "
            f"{len(encoded.ids)} training identities; were both made with the same data section?"
        )
    vectors = np.zeros((len(encoded.ids), spec.num_parameters), np.float32)
    subjects = np.asarray([number[dataset.ids[i]] for i in rows])
    vectors[subjects] = dataset.loras(rows)
    return {"target": vectors}, np.sort(subjects)
