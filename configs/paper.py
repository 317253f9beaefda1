"""The paper's recipe (LoRA Diffusion, arXiv 2412.02352) on the avatar world: `configs/avatars.py`
with a diffusion generator over LoRA-target vectors.

    hyperlora train    --config configs/paper.py --workdir runs/paper
    hyperlora evaluate --config configs/avatars.py --workdir runs/avatars \
        --config.evaluate.others.paper=runs/paper

Its grid, by flags (LoRA targets as `hyperlora distill` wrote them in WORKDIR/targets, or named by
`--config.data.targets`):

    --config.model.generator           latent_diffusion (VAE latents), diffusion (raw tokens)
    --config.model.diffusion.prediction     x0, v
    --config.model.mlp.conditioning         adalora, adanorm

The paper trains 80,000 to 600,000 steps on accelerators. Here the VAE has 86 M parameters and takes
most of the time on two CPU cores; a whole run has not been timed.
"""

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import parent_config


def get_config() -> ConfigDict:
    config = parent_config(__file__, "avatars.py")
    config.data.gauge = "svd"  # its canonical form
    config.model.generator = "latent_diffusion"
    config.model.condition_dropout = 0.1
    config.model.diffusion = {"prediction": "x0", "num_train_timesteps": 1000, "denoiser": "mlp"}
    config.model.mlp.width = 512
    config.model.mlp.conditioning = "adalora"
    config.model.vae.depth = 20
    config.generate.num_steps = 50
    config.generate.sampler = "ancestral"
    config.train.batch_size = 64
    config.train.images_per_subject = 1
    config.train.num_steps = 6000
    config.train.objectives.end_to_end = 0.0
    config.train.objectives.diffusion = 1.0
    config.train.ema_decay = 0.999
    config.train.optimizer = {
        "learning_rate": 3e-4,
        "schedule": "linear",
        "warmup_steps": 100,
        "weight_decay": 1e-2,
        "b2": 0.98,
        "clip_norm": 1.0,
    }
    config.train.vae.num_steps = 1500
    config.train.vae.optimizer.learning_rate = 3e-4
    return config
