"""`hyperlora evaluate`: every method on the same held-out identities, captions and noise."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.data import pictures
from hyperlora_jax.data.avatars import Avatars
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.distill.run import make_recipe
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate import methods as method_makers
from hyperlora_jax.evaluate.attribute_probe import AttributeProbe
from hyperlora_jax.evaluate.compare import Method, MethodResult, compare
from hyperlora_jax.evaluate.conventional import fit_conventional, seconds_per_fit
from hyperlora_jax.evaluate.protocol import EvaluationSet, make_evaluation_set
from hyperlora_jax.evaluate.report import ReportFiles, write_report
from hyperlora_jax.evaluate.sample_cache import SampleCache
from hyperlora_jax.evaluate.summary import summarise
from hyperlora_jax.hypernet.model import FOLDER, Hypernetwork
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.parallel.sharding import on_mesh
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.train.loop import open_workdir

SPEED_BATCH = 64


class Evaluation:
    """Everything that one evaluation needs, loaded once.

    Raises:
        UserError: no hypernetwork or dataset in the workdir, or one of another base.
    """

    def __init__(self, config: Any, workdir: str | Path):
        self.config, self.workdir = config, Path(str(open_workdir(workdir)))
        self.sd = load_base(config.base)
        self.mesh = make_mesh(**config.mesh)
        self.sampler = on_mesh(self.sd, self.mesh)
        self.hyper = Hypernetwork.restore(self.workdir)
        self.spec = self.hyper.spec
        check_base(self.hyper, self.sd, config.base)
        targets = config.data.targets or self.workdir / "targets"
        self.targets = open_lora_targets(targets, self.spec, self.sd.base_hash)
        if config.data.source != "avatars":
            raise UserError(
                f"data.source is {config.data.source!r}; the comparison needs exact pictures, "
                "which only 'avatars' have"
            )
        avatars = Avatars(config.data.style, config.data.size, config.data.split_seed)
        self.probe = AttributeProbe.load(config.evaluate.probe or None)
        self.validation = self._questions(avatars, "validation", config.evaluate.num_validation)
        self.test = self._questions(avatars, "test", config.evaluate.num_identities)
        self.probe.check_parts(self.test.parts)
        self.seconds: dict[str, float] = {}
        self.sampling = {
            "num_steps": config.evaluate.num_sampling_steps,
            "guidance": config.evaluate.guidance,
            "identities_per_batch": config.evaluate.identities_per_batch,
            "mesh": self.mesh,
        }

    def _questions(self, avatars: Avatars, split: str, count: int) -> EvaluationSet:
        section = self.config.evaluate
        known = frozenset(self.hyper.facts.get("trained_on", ())) | frozenset(self.targets.ids)
        return make_evaluation_set(
            avatars,
            split=split,
            identity_seed=section.identity_seed,
            num_identities=count,
            num_captions=section.num_captions,
            num_views=section.num_views,
            num_candidates=section.num_candidates,
            training_ids=known,
            cache_dir=self.workdir / "renders",
        )

    def methods(self) -> list[Method]:
        """All methods of the comparison that draw with a LoRA."""
        section = self.config.evaluate
        conventional = self._conventional()
        mean = jax.device_get(
            vectorize.unflatten(jnp.asarray(self.targets.matrix().mean(axis=0)), self.spec)
        )
        zero = jax.device_get(factors.zeros(self.spec))
        weights = method_makers.fingerprint(self.hyper.params, self.targets.metadata)
        makers = {
            "base": (lambda q: _repeat(zero, q), (1.0,)),
            "mean_lora": (lambda q: _repeat(mean, q), section.strengths),
            "shuffled": (lambda q: self._generated(np.roll(q.references, 1, 0)), section.strengths),
            "nearest": (self._nearest, section.strengths),
            "generated": (lambda q: self._generated(q.references), section.strengths),
            "conventional": (lambda q: conventional[q.split], section.strengths),
        }
        return [
            method_makers.lora_method(
                name,
                self.sampler,
                loras_of,
                sampling=self.sampling,
                strengths=strengths,
                fingerprint=method_makers.fingerprint(
                    name,
                    weights,
                    self.sd.base_hash,
                    sorted((k, v) for k, v in self.sampling.items() if k != "mesh"),
                    conventional if name == "conventional" else "",
                ),
            )
            for name, (loras_of, strengths) in makers.items()
        ]

    def _generated(self, references: np.ndarray) -> Params:
        return method_makers.generated_loras(self.hyper, references)

    def _nearest(self, questions: EvaluationSet) -> Params:
        shown = np.stack(
            [
                np.stack([pictures.decode(png) for png in self.targets[i].references])
                for i in range(len(self.targets))
            ]
        )
        return method_makers.nearest_loras(
            self.hyper,
            questions.references,
            shown.astype(np.float32) / 255.0,
            self.targets.matrix(),
            self.spec,
        )

    def _conventional(self) -> dict[str, Params]:
        section = self.config.evaluate
        recipe = make_recipe(self.config.distill, **dict(section.conventional.recipe))
        sets = [
            self.test.first(section.conventional.num_identities),
            self.validation.first(section.conventional.num_validation),
        ]
        name = method_makers.fingerprint(
            self.sd.base_hash, self.spec.fingerprint, repr(recipe), *(q.views for q in sets)
        )
        kept = self.workdir / f"conventional-{name[:24]}.npz"
        if kept.exists():
            with np.load(kept, allow_pickle=False) as file:
                return {
                    split: vectorize.unflatten(jnp.asarray(file[split]), self.spec)
                    for split in ("test", "validation")
                }
        start = time.perf_counter()
        test, validation = fit_conventional(
            self.sd,
            self.spec,
            recipe,
            sets,
            num_slots=section.conventional.num_slots,
            steps_per_call=self.config.distill.steps_per_call,
            mesh=self.mesh if self.mesh.size > 1 else None,
        )
        self.seconds["conventional"] = time.perf_counter() - start
        fitted = {"test": test, "validation": validation}
        np.savez(
            kept, **{k: np.asarray(vectorize.flatten(v, self.spec)) for k, v in fitted.items()}
        )
        return fitted

    def measure_speed(self) -> None:
        """Seconds of one LoRA, generated (amortised over a batch) and fitted alone."""
        recipe = make_recipe(self.config.distill, **dict(self.config.evaluate.conventional.recipe))
        repeats = -(-SPEED_BATCH // self.test.num_identities)
        references = np.tile(self.test.references, (repeats, 1, 1, 1))[:SPEED_BATCH]
        took = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(self.hyper.generate(jax.random.key(0), references))
            took.append(time.perf_counter() - start)
        self.seconds["generate_one_lora"] = float(np.median(took[1:])) / SPEED_BATCH
        self.seconds["fit_one_lora"] = seconds_per_fit(self.sd, self.spec, recipe, self.test)

    def run(self, say: Any = print) -> dict[str, MethodResult]:
        """Scores all methods; stores the generated LoRAs' best strength with the hypernetwork."""
        chosen = self.methods()
        start = time.perf_counter()
        results = compare(
            chosen,
            self.validation,
            self.test,
            self.probe,
            SampleCache(self.workdir / "samples"),
            say,
        )
        self.seconds["sampling"] = time.perf_counter() - start
        self.hyper = self.hyper.with_facts(default_strength=results["generated"].strength)
        self.hyper.save(self.workdir / FOLDER)
        return results

    def report(
        self,
        results: dict[str, MethodResult],
        folder: str | Path,
        *,
        torch_parity: dict[str, Any] | None = None,
        seconds: dict[str, float] | None = None,
        page_name: str = "index.html",
        title: str = "Zero-shot LoRAs, evaluated",
    ) -> tuple[dict[str, Any], ReportFiles]:
        """Writes the page, metrics.json and figures; returns the metrics and where things are."""
        summary = summarise(
            results,
            self.test,
            self.validation,
            torch_parity=torch_parity,
            seconds={**self.seconds, **(seconds or {})},
            facts={
                "base": self.config.base,
                "base_hash": self.sd.base_hash,
                "spec": self.spec.fingerprint,
                "num_targets": len(self.targets),
                "num_training_identities": len(self.hyper.facts.get("trained_on", ())),
                "training_steps": self.hyper.facts.get("num_steps"),
                "config": self.config.to_dict(),
            },
        )
        lead = (
            f"LoRAs for {self.test.num_identities} {self.config.data.style} identities that were "
            "never trained on, written in one pass from one reference picture each."
        )
        files = write_report(
            folder,
            summary,
            results,
            self.test,
            title=title,
            lead=lead,
            done=_story(self.config, self.test, len(self.targets)),
            page_name=page_name,
        )
        return summary, files


def check_base(hyper: Hypernetwork, sd: Any, name: str) -> None:
    """Raises UserError unless the hypernetwork writes LoRAs for this base model."""
    wanted = hyper.facts.get("base_hash")
    if wanted != sd.base_hash:
        raise UserError(
            f"base {name}: its UNet has the hash {sd.base_hash[:12]}, but the hypernetwork was "
            f"trained on {hyper.facts.get('base')} with {str(wanted)[:12]}"
        )


def evaluate(config: Any, workdir: str | Path) -> ReportFiles:
    """Runs the comparison of a finished workdir and writes WORKDIR/report."""
    evaluation = Evaluation(config, workdir)
    results = evaluation.run()
    evaluation.measure_speed()
    _, files = evaluation.report(results, evaluation.workdir / "report")
    return files


def _repeat(lora: Params, questions: EvaluationSet) -> Params:
    return factors.repeat(lora, questions.num_identities)


def _story(config: Any, test: EvaluationSet, num_targets: int) -> list[str]:
    recipe = config.evaluate.conventional
    return [
        f"{num_targets} conventional LoRAs of training identities were fitted at once "
        f"({config.distill.num_steps} steps each); their mean and nearest neighbour are controls.",
        f"A hypernetwork was trained for {config.train.num_steps} steps on "
        f"{config.data.num_identities} identities through the frozen base model: every subject of "
        "a batch draws with the LoRA that was just written for it.",
        f"Every method drew {test.num_identities} held-out identities under {test.num_captions} "
        "captions that training never saw, from the same noise, at the strength that was best for "
        "it on other held-out identities. The conventional LoRA was fitted to "
        f"{test.views.shape[1]} pictures of each of {recipe.num_identities} of these identities "
        f"for {dict(recipe.recipe).get('num_steps', config.distill.num_steps)} steps.",
    ]
