"""`hyperlora evaluate`: every method on the same held-out identities, captions and noise."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.distill.distillation import make_recipe
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.evaluate.audits.analysis import all_sections
from hyperlora_jax.evaluate.audits.quality_curves import fitting_checkpoints
from hyperlora_jax.evaluate.compare import Method, MethodResult, compare, run_method
from hyperlora_jax.evaluate.exams import EMBEDDINGS, open_exam
from hyperlora_jax.evaluate.fitted_sets import FittedSets, seconds_per_fit
from hyperlora_jax.evaluate.judges.further_scores import further_scorers, further_scores
from hyperlora_jax.evaluate.method_loras import (
    NEED_PICTURES,
    Context,
    Source,
    make_source,
    runnable_methods,
)
from hyperlora_jax.evaluate.methods import fingerprint, lora_method
from hyperlora_jax.evaluate.own_source import ChosenDefaults, check_source, report_folder
from hyperlora_jax.evaluate.protocol import check_disjoint
from hyperlora_jax.evaluate.report import comparison_file
from hyperlora_jax.evaluate.report.html_page import ReportFiles, standard_figures, write_report
from hyperlora_jax.evaluate.report.story import lead, story
from hyperlora_jax.evaluate.report.summary import summarise
from hyperlora_jax.evaluate.sample_cache import SampleCache
from hyperlora_jax.evaluate.training_loras import open_training_loras
from hyperlora_jax.hypernet.hypernetwork import FOLDER, Hypernetwork
from hyperlora_jax.parallel import multihost, shared_work
from hyperlora_jax.parallel.sharding import on_mesh
from hyperlora_jax.stable_diffusion.embedded import image_size, load_base
from hyperlora_jax.train.events import goodput
from hyperlora_jax.train.loop import open_workdir

SPEED_BATCH = 64


class Evaluation:
    """Everything that one evaluation needs, loaded once.

    Of several processes all do the same, share out what takes long by identities
    (`parallel/shared_work.py`), and the first one writes; `config.mesh` plays no part.

    Args:
        encoder: path of the condition encoder, see `Hypernetwork.restore`.
        command: what the page says to run it again.

    Attributes:
        names: the methods that can run.
        notes: what a reader must know: what was left out or cut, who judges, a sentence each.

    Raises:
        UserError: no hypernetwork in the workdir, or one of another base or other pictures, a
            method that was asked for and cannot run; see also `open_exam`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.PathLike,
        encoder: str | None = None,
        command: str = "",
    ):
        self.config, self.workdir = config, open_workdir(workdir)
        self.command = command
        self.scratch = storage.scratch(self.workdir)
        self.sd = load_base(config.base)
        self.mesh = shared_work.local_mesh()
        self.sampler = on_mesh(self.sd, self.mesh)
        self.hyper = Hypernetwork.restore(self.workdir, encoder)
        self.spec = self.hyper.spec
        self.hyper.check_base(self.sd, config.base)
        check_source(config, self.hyper.facts, self.workdir)
        self.training = open_training_loras(
            config.data, self.workdir / "targets", self.spec, self.sd.base_hash
        )
        trained_on = frozenset(self.hyper.facts.get("trained_on", ()))
        self.exam = multihost.first_then_others(
            "exam",
            lambda: open_exam(
                config,
                image_size(self.sd),
                trained_on,
                trained_on | self.training.ids,
                self.scratch,
                self.hyper.encoder,
            ),
        )
        self.validation, self.test = self.exam.validation, self.exam.test
        given = "evaluate.methods" in config.get("given", ())
        self.names, lines = runnable_methods(
            config.evaluate.methods,
            [name for name, path in config.evaluate.others.items() if path],
            self.training,
            self.test.num_identities,
            max(map(len, self.test.views)),
            given=given,
        )
        wanted, line = config.evaluate.steps_to_quality, ""
        self.checkpoints: tuple[int, ...] = ()
        if wanted.num_identities and "conventional" in self.names:
            self.checkpoints, line = fitting_checkpoints(
                wanted.checkpoints, self.conventional_recipe.num_steps, config.get("given", ())
            )
        self.notes = [*self.exam.notes, *lines, *([line] if line else [])]
        self.further = further_scorers(config.evaluate, self.test)
        self.seconds: dict[str, float] = {}
        self.defaults: ChosenDefaults | None = None
        self.sampling = {
            "num_steps": config.evaluate.num_sampling_steps,
            "guidance": config.evaluate.guidance,
            "identities_per_batch": config.evaluate.identities_per_batch,
            "mesh": self.mesh,
        }

    @property
    def conventional_recipe(self) -> Recipe:
        """Of the LoRAs to compare with."""
        section = self.config.evaluate.conventional.recipe
        return make_recipe(self.config.distill, **dict(section))

    @functools.cached_property
    def context(self) -> Context:
        """What the methods' LoRAs are made of."""
        section, training = self.config.evaluate, self.training
        vectors = embeddings = None
        if not training.no_loras:
            vectors = training.vectors(self.config.data.gauge, self.scratch / "cache")
        if {*NEED_PICTURES} & {*self.names}:
            embeddings = training.embeddings(self.hyper.encoder, self.scratch / EMBEDDINGS)
        sets = [self.test.first(section.conventional.num_identities)]
        if self.validation is not None:
            sets.append(self.validation.first(section.conventional.num_validation))
        return Context(
            self.spec,
            self.hyper,
            vectors,
            embeddings,
            FittedSets(
                self.scratch,
                self.sd,
                self.spec,
                sets,
                self.conventional_recipe,
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
        hypers = {}
        for name, path in self.config.evaluate.others.items():
            if path:
                hypers[name] = Hypernetwork.restore(path)
                hypers[name].check_base(self.sd, self.config.base)
                check_disjoint(self.test.identities, frozenset(hypers[name].facts["trained_on"]))
        return hypers

    def sources(self, names: Sequence[str]) -> dict[str, Source]:
        """Where the LoRAs of some methods come from."""
        return {name: make_source(name, self.context) for name in names}

    def methods(self, names: Sequence[str]) -> list[Method]:
        """Methods of the comparison that draw with a LoRA."""
        section, choosing = self.config.evaluate, self.validation is not None
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
                strengths=section.strengths if source.tuned and choosing else (1.0,),
                guidances=section.guidances if source.guided and choosing else (1.0,),
                fingerprint=fingerprint(name, *settings, source.depends_on),
            )
            for name, source in self.sources(names).items()
        ]

    def measure_speed(self) -> None:
        """Seconds of one LoRA, generated (amortised over a batch) and fitted alone."""
        assert self.context.fitted is not None
        recipe = self.context.fitted.recipe
        self.seconds["generate_one_lora"] = self.seconds_per_lora(self.hyper)
        self.seconds["fit_one_lora"] = seconds_per_fit(self.sd, self.spec, recipe, self.test)

    def seconds_per_lora(self, hyper: Hypernetwork, num_views: int = 1) -> float:
        """Of a generator in one pass from so many pictures, amortised over a batch."""
        shown = self.test.first_views(num_views)
        of_each = max(map(len, shown))  # who shows fewer shows the last one again
        filled = [own[np.minimum(np.arange(of_each), len(own) - 1)] for own in shown]
        references = np.stack([filled[n % len(filled)] for n in range(SPEED_BATCH)])
        took = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(hyper.generate(jax.random.key(0), references, strength=1.0))
            took.append(time.perf_counter() - start)
        return float(np.median(took[1:])) / SPEED_BATCH

    def run(self, say: Callable[[str], object] = print) -> dict[str, MethodResult]:
        """Scores all methods; keeps the generated LoRAs' best strength with the hypernetwork if
        these are the pictures that it was trained on.

        Args:
            say: told what a reader must know and what is being done, one line at a time.
        """
        for note in self.notes:
            say(note)
        cache = SampleCache(self.scratch / "samples")
        start = time.perf_counter()
        if "generated" in self.names:
            # First of all: refinement starts from the generated LoRA at its best strength.
            method = self.methods(["generated"])[0]
            chosen = run_method(method, self.validation, self.test, self.exam.score, cache)
            if chosen.curve or chosen.guidance_curve:
                self._keep_defaults(chosen, say)
        methods, score = self.methods(self.names), self.exam.score
        results = compare(methods, self.validation, self.test, score, cache, say)
        self.seconds["sampling"] = time.perf_counter() - start
        return results

    def _keep_defaults(self, chosen: MethodResult, say: Callable[[str], object]) -> None:
        assert self.validation is not None
        writes, where = self.exam.knows_all, self.workdir / FOLDER
        self.defaults = ChosenDefaults.of(self.hyper, chosen, self.validation, kept=writes)
        # Kept or not: refinement in this evaluation starts from the best strength.
        self.hyper = self.defaults.applied(self.hyper)
        if writes and multihost.is_first():
            self.hyper.save(where)
        self.context = dataclasses.replace(self.context, hyper=self.hyper)
        say(self.defaults.line(str(where)))

    @property
    def training_seconds(self) -> float | None:
        """How long the hypernetwork was trained, None where nobody wrote it down."""
        return goodput(self.workdir / "events.jsonl").get("wall")

    def summary(
        self,
        results: dict[str, MethodResult],
        *,
        torch_parity: Json | None = None,
        seconds: dict[str, float] | None = None,
        sections: Json | None = None,
    ) -> Json:
        """The content of metrics.json."""
        defaults = [self.defaults.line("the checkpoint")] if self.defaults else []
        numbers = summarise(
            results,
            self.test,
            self.validation,
            torch_parity=torch_parity,
            seconds={**self.seconds, **(seconds or {})},
            further=further_scores(self.further, {n: r.images for n, r in results.items()}),
            judges=self.exam.judged(results),
            facts={
                "base": self.config.base,
                "base_hash": self.sd.base_hash,
                "spec": self.spec.fingerprint,
                "generator": self.hyper.model.get("generator", "regression"),
                "num_targets": len(self.training),
                "num_training_identities": len(self.hyper.facts.get("trained_on", ())),
                "training_steps": self.hyper.facts.get("num_steps"),
                "training_seconds": self.training_seconds,
                "trained_on_targets": "targets" in self.hyper.facts,
                "data": self.hyper.facts.get("data", {}),
                "targets": self.training.facts(),
                "defaults": self.defaults and self.defaults.to_json(),
                "notes": [*self.notes, *defaults],
                "command": self.command,
                "config": self.config.to_dict(),
            },
        )
        return {**numbers, **(sections or {})}

    def report(
        self,
        results: dict[str, MethodResult],
        folder: epath.PathLike,
        *,
        torch_parity: Json | None = None,
        seconds: dict[str, float] | None = None,
        page_name: str = "index.html",
        title: str = "Zero-shot LoRAs, evaluated",
    ) -> tuple[Json, ReportFiles]:
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
            [
                *standard_figures(self.test, results),
                *(figure for section in shown for figure in section.figures),
            ],
            title=title,
            lead=lead(self.test),
            done=story(summary),
            page_name=page_name,
        )
        return summary, files


def evaluate(
    config: ConfigDict,
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
    evaluation = Evaluation(config, workdir, encoder, command)
    results = evaluation.run()
    evaluation.measure_speed()
    own = evaluation.exam.knows_all
    folder = report_folder(evaluation.workdir, evaluation.test.facts, own=own)
    summary, files = evaluation.report(results, folder)
    if comparison:
        content = comparison_file.measured(evaluation, summary, command)
        if multihost.is_first():
            comparison_file.write(comparison, content)
    return files
