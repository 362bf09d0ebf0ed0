"""The loop: for each experience grow, train, consolidate, evaluate, record. No strategy's name is in it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clplatform import checkpoint
from clplatform.budget import counted, spent
from clplatform.data import derive_seed
from clplatform.evaluate import confusion, evaluate_row, has_meaning, only, samples, score
from clplatform.fitting import Fitter
from clplatform.learner import Learner
from clplatform.metric.memory import forget_peak, peak_memory
from clplatform.results import Results
from clplatform.saved import save_model
from clplatform.strategy.base import n_bytes
from clplatform.types import ClplatformError, Experience, ExperienceInfo, Stream


class AnotherStructure(ClplatformError):
    """The model that is built is not the one that a checkpoint is of."""


class Observer(Protocol):
    """Who is told how a run goes (terminal, tracker). It never changes the run."""

    def start_experience(self, experience: Experience, learner: Learner, epochs: int) -> None: ...
    def finish_experience(self, info: ExperienceInfo | None, results: Results, learner: Learner) -> None: ...


class Experiment:
    """One strategy over one stream.

    Everything random is seeded from (seed, experience, phase), so nothing that happened before, such as an
    evaluation or a resume, changes what follows.

    Args:
        learner: the model and its strategies, before any training.
        stream: what to learn.
        fitter: trains a stage.
        results: the record to fill.
        run_dir: where everything is written.
        config: the resolved configuration, saved with the model.
        seed: of training.
        observers: see `Observer`.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        stream: Stream,
        fitter: Fitter,
        results: Results,
        run_dir: Path,
        config: dict[str, Any],
        seed: int,
        observers: list[Observer] | None = None,
    ) -> None:
        self.learner, self.stream, self.fitter, self.results = learner, stream, fitter, results
        self.run_dir, self.config, self.seed, self.observers = run_dir, config, seed, observers or []
        self.before_record: Callable[[ExperienceInfo], None] | None = None  # may refuse what an experience has led to
        self.checkpoints = run_dir / "checkpoints"
        probe = fitter.make_trainer()
        self.device = probe.strategy.root_device
        learner.precision_context = probe.precision_plugin.forward_context

    # -- the loop -------------------------------------------------------------------------------------------
    def run(self, *, resume: bool = False) -> Results:
        """Learn the stream; with `resume`, what is left of it."""
        forget_peak(self.device)
        first = self._restore() if resume else 0
        if first == 0:
            self._before_any_training()
        else:
            self._evaluate_added(first)
        for experience in list(self.stream)[first:]:
            self._learn(experience, resume=resume and experience.index == first)
        self._finish()
        return self.results

    def _learn(self, experience: Experience, *, resume: bool) -> None:
        times: dict[str, float] = {}
        chain, learner = self.learner.chain, self.learner
        with clock(times, "train"):
            self._seed(experience, "before")
            learner.build(experience.info)
            learner.to(self.device).experience = experience
            self._start(experience)
            chain.before_experience(learner, experience)
            self._train(experience, resume=resume)
        with clock(times, "consolidate"):
            self._seed(experience, "after")
            chain.after_experience(learner, experience)
            learner.counts()  # what evaluation computes is not counted
        with clock(times, "evaluate"):
            self._evaluate()
        if self.before_record is not None:
            self.before_record(experience)
        self._record(experience, times)

    def _train(self, experience: Experience, *, resume: bool) -> None:
        chain, learner = self.learner.chain, self.learner
        data = chain.train_data(learner, experience, experience.train)
        stages = chain.stages(learner, experience)
        allowances, budget = self.fitter.allowances(learner, stages, data), self.fitter.budget
        begin = counted(learner, budget.unit) if budget is not None else 0.0
        first, step_path = self._restore_stage(experience) if resume else (0, None)
        for number, stage in enumerate(stages):
            if number < first:
                continue
            self._seed(experience, f"stage {number}")
            learner.position = (experience.index, number)
            chain.before_stage(learner, experience, stage)
            self.fitter.fit(
                learner,
                experience,
                stage,
                data if stage.data is None else stage.data,
                order_seed=derive_seed(self.seed, experience.index, "order", number),
                step_path=self.checkpoints / "step.ckpt",
                resume_from=step_path if number == first else None,
                allowance=allowances[number],
            )
            chain.after_stage(learner, experience, stage)
            if number + 1 < len(stages):
                self._save("stage.ckpt", experience.index, number + 1)
        if budget is not None:
            used = spent(learner, budget.unit) - begin
            self.results.budget.setdefault("used", []).append(
                int(used) if budget.unit in ("steps", "samples") else used
            )

    # -- parts of the loop ------------------------------------------------------------------------------------
    def _seed(self, experience: ExperienceInfo, phase: str) -> None:
        seed = derive_seed(self.seed, experience.index, phase)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.learner.generator.manual_seed(derive_seed(seed, "strategy"))

    def _before_any_training(self) -> None:
        """Row 0 of the matrix: the first structure, untrained."""
        self._seed(self.stream[0], "before")
        self.learner.build(self.stream[0].info)
        self.learner.to(self.device)
        self._evaluate()
        for observer in self.observers:
            observer.finish_experience(None, self.results, self.learner)

    def _start(self, experience: Experience) -> None:
        if "past_data" in self.learner.chain.needs:
            self.learner.past = [self.stream[i].train for i in range(experience.index)]
        for observer in self.observers:
            observer.start_experience(experience, self.learner, self.fitter.epochs(self.learner.stage))

    def _evaluate(self) -> None:
        size = self.fitter.eval_batch_size
        test, validation = (evaluate_row(self.learner, self.stream, s, size) for s in ("test", "validation"))
        primary = self.results.primary_metric["name"]
        self.results.matrix.append(only(test, primary))
        self.results.validation_matrix.append(only(validation, primary))
        for name in dict.fromkeys(name for scores in test if scores for name in scores):
            if name != primary:
                rows = self.results.scores.setdefault(name, [])
                rows += [[None] * len(test)] * (len(self.results.matrix) - 1 - len(rows))  # it had no meaning before
                rows.append(only(test, name))
        self.results.samples.append(samples(self.learner, self.stream, size))
        self.learner.flops.drop()

    def _evaluate_added(self, done: int) -> None:
        """What the last row of a matrix lacks because the experience has come since (`clplatform update`): how good the model
        is there before it learns it."""
        size, primary = self.fitter.eval_batch_size, self.results.primary_metric["name"]
        for split, matrix in (("test", self.results.matrix), ("validation", self.results.validation_matrix)):
            for experience in list(self.stream)[done:] if len(matrix) == done + 1 else ():  # old records may lack one
                data = getattr(experience, split)
                if matrix[-1][experience.index] is not None or not data or not has_meaning(self.learner, experience):
                    continue
                found = score(self.learner, self.stream, experience, data, size)
                matrix[-1][experience.index] = found[primary]
                for name, rows in self.results.scores.items() if split == "test" else ():
                    rows[-1][experience.index] = found.get(name)
        self.learner.flops.drop()

    def _record(self, experience: Experience, times: dict[str, float]) -> None:
        """Results first, then the checkpoint: a crash between them costs a repetition, never a row."""
        self.results.timing.append(times)
        self.results.cost = self._cost()
        self.results.kept_bytes.append(n_bytes(self.learner.chain.cost()))
        self.results.save(self.run_dir)
        if self.config.get("keep_models"):
            folder = self.run_dir / "models" / f"after_{experience.index + 1}"
            save_model(folder, self.learner, self.stream, self.config)
        self._save("experience.ckpt", experience.index + 1, 0)
        for name in ("stage.ckpt", "step.ckpt"):
            (self.checkpoints / name).unlink(missing_ok=True)
        for observer in self.observers:
            observer.finish_experience(experience.info, self.results, self.learner)

    def _finish(self) -> None:
        self.results.confusion = confusion(self.learner, self.stream, self.fitter.eval_batch_size)
        save_model(self.run_dir / "model", self.learner, self.stream, self.config)
        self.results.status = "completed"
        self.results.save(self.run_dir)

    def _cost(self) -> dict[str, float]:
        return {
            "seconds": sum(sum(times.values()) for times in self.results.timing),
            **self.learner.counts(),
            "peak_memory_bytes": peak_memory(self.device),
            **self.learner.chain.cost(),
        }

    # -- stopping and going on ----------------------------------------------------------------------------------
    def _save(self, name: str, index: int, stage: int) -> None:
        state = {
            "position": [index, stage],
            "weights": self.learner.state_dict(),
            "strategy": self.learner.chain.state_dict(),
            "counts": self.learner.counts(),
            "seconds": self.learner.seconds,
        }
        checkpoint.save(self.checkpoints / name, state)

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.learner.load_state_dict(state["weights"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise AnotherStructure(
                f"strategy={'+'.join(self.learner.chain.strategies)}: the model's structure is not that of its checkpoint, as "
                f"where it was made for another number of classes or experiences ({reason})"
            ) from None
        self.learner.chain.load_state_dict(state["strategy"])
        self.learner.set_counts(state["counts"])
        self.learner.seconds = state.get("seconds", 0.0)

    def _restore(self) -> int:
        """Go back to the end of the last complete experience; returns the number of complete ones."""
        path = self.checkpoints / "experience.ckpt"
        done = 0
        if path.exists():
            state = checkpoint.load(path)
            done = state["position"][0]
            for experience in list(self.stream)[:done]:  # the structure first, then the weights
                self._seed(experience, "before")
                self.learner.build(experience.info)
            self.learner.to(self.device)  # where strategies put what they restore
            self._load(state)
        # A crash between results and checkpoint leaves a row too many.
        rows = done + 1 if done else 0
        results = self.results
        for kept in (results.matrix, results.validation_matrix, results.samples, *results.scores.values()):
            del kept[rows:]
        del results.timing[done:]
        del results.budget.get("used", [])[done:]
        self.results.status, self.results.error = "running", None
        return done

    def _restore_stage(self, experience: Experience) -> tuple[int, Path | None]:
        """Where to go on inside an experience: number of its first stage to run, and its `step.ckpt` if any."""
        stage_path, step_path = self.checkpoints / "stage.ckpt", self.checkpoints / "step.ckpt"
        first = 0
        if stage_path.exists():
            state = checkpoint.load(stage_path)
            if state["position"][0] == experience.index:
                self._load(state)
                first = state["position"][1]
        if step_path.exists():
            try:
                position = checkpoint.load(step_path)["clplatform"]["position"]
            except ClplatformError as error:
                self.results.notes.append(f"{error}: went on from the last complete stage instead")
            else:
                if position == [experience.index, first]:
                    return first, step_path
        return first, None


@contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent inside to `times[name]`."""
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start
