"""`hyperlora evaluate`: every method on the same held-out identities, captions and noise."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.data.gauged_targets import read_in_gauge
from hyperlora_jax.data.lora_targets import open_lora_targets
from hyperlora_jax.distill.run import make_recipe
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate import comparison_file
from hyperlora_jax.evaluate.analysis import all_sections
from hyperlora_jax.evaluate.compare import Method, MethodResult, compare, run_method
from hyperlora_jax.evaluate.conventional import seconds_per_fit
from hyperlora_jax.evaluate.exams import EMBEDDINGS, lead, open_exam, story
from hyperlora_jax.evaluate.fitted_sets import FittedSets
from hyperlora_jax.evaluate.further_scores import further_scorers, further_scores
from hyperlora_jax.evaluate.lora_sources import (
    Context,
    Source,
    make_source,
    reference_embeddings,
)
from hyperlora_jax.evaluate.methods import check_base, fingerprint, lora_method
from hyperlora_jax.evaluate.questions import check_disjoint
from hyperlora_jax.evaluate.report import ReportFiles, write_report
from hyperlora_jax.evaluate.sample_cache import SampleCache
from hyperlora_jax.evaluate.summary import summarise
from hyperlora_jax.hypernet.model import FOLDER, Hypernetwork
from hyperlora_jax.parallel import multihost, shared_work
from hyperlora_jax.parallel.sharding import on_mesh
from hyperlora_jax.stable_diffusion.embedded import image_size, load_base
from hyperlora_jax.train.loop import open_workdir

SPEED_BATCH = 64


class Evaluation:
    """Everything that one evaluation needs, loaded once.

    Of several processes all do the same, share out what takes long by identities
    (`parallel/shared_work.py`), and the first one writes; `config.mesh` plays no part.

    Raises:
        UserError: no hypernetwork or dataset in the workdir, or one of another base.
    """

    def __init__(self, config: Any, workdir: epath.PathLike, encoder: str | None = None):
        self.config, self.workdir = config, open_workdir(workdir)
        self.scratch = storage.scratch(self.workdir)
        self.sd = load_base(config.base)
        self.mesh = shared_work.local_mesh()
        self.sampler = on_mesh(self.sd, self.mesh)
        self.hyper = Hypernetwork.restore(self.workdir, encoder)
        self.spec = self.hyper.spec
        check_base(self.hyper, self.sd, config.base)
        targets = config.data.targets or self.workdir / "targets"
        self.targets = open_lora_targets(
            targets, self.spec, self.sd.base_hash, config.data.skip_damaged
        )
        known = frozenset(self.hyper.facts.get("trained_on", ())) | frozenset(self.targets.ids)
        self.exam = multihost.first_then_others(
            "exam", lambda: open_exam(config, image_size(self.sd), known, self.scratch)
        )
        self.validation, self.test = self.exam.validation, self.exam.test
        self.further = further_scorers(config.evaluate, self.test)
        self.seconds: dict[str, float] = {}
        self.sampling = {
            "num_steps": config.evaluate.num_sampling_steps,
            "guidance": config.evaluate.guidance,
            "identities_per_batch": config.evaluate.identities_per_batch,
            "mesh": self.mesh,
        }

    @functools.cached_property
    def context(self) -> Context:
        """What the methods' LoRAs are made of."""
        section, targets = self.config.evaluate, self.targets
        gauged = multihost.first_then_others(
            "gauge",
            lambda: read_in_gauge(targets, self.config.data.gauge, self.scratch / "cache"),
        )
        rows = targets.split_indices("train")
        if self.config.data.num_targets:
            rows = rows[: self.config.data.num_targets]
        return Context(
            self.spec,
            self.hyper,
            np.asarray(gauged.vectors[rows]),
            reference_embeddings(self.hyper.encoder, targets, rows, self.scratch / EMBEDDINGS),
            FittedSets(
                self.scratch,
                self.sd,
                self.spec,
                [
                    self.test.first(section.conventional.num_identities),
                    self.validation.first(section.conventional.num_validation),
                ],
                make_recipe(self.config.distill, **dict(section.conventional.recipe)),
                make_recipe(self.config.distill, **dict(section.refine.recipe)),
                make_recipe(self.config.distill, **dict(section.linear_combination.recipe)),
                section.refine.rank,
                section.linear_combination.per,
                section.conventional.num_slots,
                self.config.distill.steps_per_call,
                self.mesh if self.mesh.size > 1 else None,
            ),
            self.others,
            dict(self.config.model.baseline),
        )

    @functools.cached_property
    def others(self) -> dict[str, Hypernetwork]:
        """More trained generators, by name."""
        found = {}
        for name, path in self.config.evaluate.others.items():
            if path:
                found[name] = Hypernetwork.restore(path)
                check_base(found[name], self.sd, self.config.base)
                check_disjoint(self.test.identities, frozenset(found[name].facts["trained_on"]))
        return found

    def sources(self, names: Sequence[str]) -> dict[str, Source]:
        """Where the LoRAs of some methods come from.

        Raises:
            UserError: an unknown method.
        """
        try:
            return {name: make_source(name, self.context) for name in names}
        except ValueError as error:
            raise UserError(f"config.evaluate.methods: {error}") from error

    def methods(self, names: Sequence[str]) -> list[Method]:
        """Methods of the comparison that draw with a LoRA."""
        section = self.config.evaluate
        settings = [
            self.sd.base_hash,
            sorted((k, v) for k, v in self.sampling.items() if k != "mesh"),
        ]
        return [
            lora_method(
                name,
                self.sampler,
                source.loras_of,
                sampling=self.sampling,
                strengths=section.strengths if source.tuned else (1.0,),
                guidances=section.guidances if source.guided else (1.0,),
                fingerprint=fingerprint(name, *settings, source.depends_on),
            )
            for name, source in self.sources(names).items()
        ]

    def measure_speed(self) -> None:
        """Seconds of one LoRA, generated (amortised over a batch) and fitted alone."""
        recipe = self.context.fitted.recipe
        self.seconds["generate_one_lora"] = self.seconds_per_lora(self.hyper)
        self.seconds["fit_one_lora"] = seconds_per_fit(self.sd, self.spec, recipe, self.test)

    def seconds_per_lora(self, hyper: Hypernetwork) -> float:
        """Of a generator in one pass, amortised over a batch."""
        repeats = -(-SPEED_BATCH // self.test.num_identities)
        references = np.tile(self.test.references, (repeats, 1, 1, 1))[:SPEED_BATCH]
        took = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(hyper.generate(jax.random.key(0), references, strength=1.0))
            took.append(time.perf_counter() - start)
        return float(np.median(took[1:])) / SPEED_BATCH

    def run(self, say: Any = print) -> dict[str, MethodResult]:
        """Scores all methods; stores the generated LoRAs' best strength with the hypernetwork."""
        others = [name for name, path in self.config.evaluate.others.items() if path]
        asked = dict.fromkeys([*self.config.evaluate.methods, *others])
        names = [name for name in asked if name not in ("exact", "copy_reference")]
        cache = SampleCache(self.scratch / "samples")
        start = time.perf_counter()
        if "generated" in names:
            # First of all: refinement starts from the generated LoRA at its best strength.
            method = self.methods(["generated"])[0]
            chosen = run_method(method, self.validation, self.test, self.exam.score, cache)
            self._keep_defaults(chosen)
        methods, score = self.methods(names), self.exam.score
        results = compare(methods, self.validation, self.test, score, cache, say)
        self.seconds["sampling"] = time.perf_counter() - start
        return results

    def _keep_defaults(self, chosen: MethodResult) -> None:
        generate = dict(self.hyper.facts.get("generate", {}))
        if chosen.guidance_curve:
            generate["guidance"] = chosen.guidance
        self.hyper = self.hyper.with_facts(default_strength=chosen.strength, generate=generate)
        if multihost.is_first():
            self.hyper.save(self.workdir / FOLDER)
        self.context = dataclasses.replace(self.context, hyper=self.hyper)

    def summary(
        self,
        results: dict[str, MethodResult],
        *,
        torch_parity: dict[str, Any] | None = None,
        seconds: dict[str, float] | None = None,
        sections: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The content of metrics.json."""
        return summarise(
            results,
            self.test,
            self.validation,
            torch_parity=torch_parity,
            seconds={**self.seconds, **(seconds or {})},
            sections=sections,
            further=further_scores(self.further, {n: r.images for n, r in results.items()}),
            judges=self.exam.judged(results, self.hyper.encoder),
            facts={
                "base": self.config.base,
                "base_hash": self.sd.base_hash,
                "spec": self.spec.fingerprint,
                "generator": self.hyper.model.get("generator", "regression"),
                "num_targets": len(self.targets),
                "num_training_identities": len(self.hyper.facts.get("trained_on", ())),
                "training_steps": self.hyper.facts.get("num_steps"),
                "config": self.config.to_dict(),
            },
        )

    def report(
        self,
        results: dict[str, MethodResult],
        folder: epath.PathLike,
        *,
        torch_parity: dict[str, Any] | None = None,
        seconds: dict[str, float] | None = None,
        page_name: str = "index.html",
        title: str = "Zero-shot LoRAs, evaluated",
    ) -> tuple[dict[str, Any], ReportFiles]:
        """The metrics, and where process 0 wrote the page, metrics.json and figures."""
        shown = all_sections(self, results)
        summary = self.summary(
            results,
            torch_parity=torch_parity,
            seconds=seconds,
            sections={section.name: section.numbers for section in shown},
        )
        files = write_report(
            folder,
            summary,
            results,
            self.test,
            title=title,
            lead=lead(self.config, self.test),
            done=story(self.config, self.test, len(self.targets)),
            page_name=page_name,
            extra_figures=[figure for section in shown for figure in section.figures],
        )
        return summary, files


def evaluate(
    config: Any,
    workdir: epath.PathLike,
    comparison: str | Path = "",
    command: str = "",
    encoder: str | None = None,
) -> ReportFiles:
    """Runs the comparison of a finished workdir and writes WORKDIR/report.

    Args:
        comparison: file for `comparison_file.measured`, "" for none; command: what made it.
        encoder: path of the condition encoder, see `Hypernetwork.restore`.
    """
    evaluation = Evaluation(config, workdir, encoder)
    results = evaluation.run()
    evaluation.measure_speed()
    summary, files = evaluation.report(results, evaluation.workdir / "report")
    if comparison:
        content = comparison_file.measured(evaluation, summary, command)
        if multihost.is_first():
            comparison_file.write(comparison, content)
    return files
