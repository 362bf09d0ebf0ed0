"""Can a run be repeated, stopped, resumed and loaded?"""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clplatform import checkpoint
from clplatform.check.promise import Broken, DoesNotApply, promise
from clplatform.check.subject import Run, Subject
from clplatform.check.world import same
from clplatform.schedule import schedule


def reproducible(subject: Subject) -> None:
    """The same seed gives the same weights and the same accuracy matrix."""
    once, again = subject.run(), subject.run(guarded=True)
    promise(same(once.after[1], again.after[1]), "two runs with one seed give different weights")
    promise(once.results.matrix == again.results.matrix, "two runs with one seed give different accuracies")


def state(subject: Subject) -> None:
    """Its state goes through a file without unpickling, and comes back complete."""
    run, folder = subject.run(), subject.folder()
    before = flat(run.learner.chain.state_dict())
    try:
        checkpoint.save(folder / "x.ckpt", {"strategy": run.learner.chain.state_dict()})
        loaded = checkpoint.load(folder / "x.ckpt")
    except (pickle.PickleError, TypeError, AttributeError) as error:
        raise Broken(f"state_dict() holds what cannot be loaded without unpickling: {error}") from None
    learner = rebuilt(subject, run)
    learner.chain.load_state_dict(loaded["strategy"])
    after = flat(learner.chain.state_dict())
    promise(
        before.keys() == after.keys(), f"after loading, the state differs in {sorted(before.keys() ^ after.keys())}"
    )
    for path, value in before.items():
        equal = torch.equal(value, after[path]) if isinstance(value, Tensor) else value == after[path]
        promise(bool(equal), f"after loading, {path} is another")


def resumes(subject: Subject) -> None:
    """A run that is killed in the middle of an epoch, or between experiences, goes on to the same bits."""
    whole, folder = subject.run(**STOPPABLE), subject.folder()
    between = subject.new_run(folder=folder, kill=0, **STOPPABLE)
    middle = subject.new_run(folder=folder, kill=5, resume=True, **STOPPABLE)
    resumed, where = middle, "after the first experience"
    if middle.killed:  # else: it trains nothing by gradients, so that there is no batch to stop after
        resumed = subject.new_run(folder=folder, resume=True, **STOPPABLE)
        where += ", and again in the middle of the second"
    assert between.killed
    promise(
        same(whole.after[1], resumed.after[-1]),
        f"killed {where}, it went on to other weights: something is missing from state_dict() or drawn from "
        "another generator than learner.generator",
    )
    promise(whole.results.matrix == resumed.results.matrix, f"killed {where}, it went on to other accuracies")


def takes_updates(subject: Subject) -> None:
    """An experience that comes after all (`clplatform update`) is learned as one that was announced, unless it needs the length."""
    if "length" in subject.needs:
        raise DoesNotApply(
            "how many experiences or classes there will be changes what it does, as it declares (length)"
        )
    announced, folder, stream = subject.run(), subject.folder(), subject.stream()
    info = stream.info
    stream.info = replace(
        info,
        n_experiences=1,
        classes_per_experience=info.classes_per_experience[:1],
        class_names=info.class_names[: stream[0].n_seen_classes],
    )
    stream.experiences = stream.experiences[:1]
    subject.new_run(folder=folder, stream=stream)
    updated = subject.new_run(folder=folder, resume=True)
    promise(
        same(announced.after[1], updated.after[-1]),
        "the second experience leads to other weights if it was announced before the first: classes or experiences to come "
        "must not be looked at, or needs must have length",
    )
    promise(
        announced.results.matrix[2] == updated.results.matrix[2],
        "an experience that comes after all has other accuracies",
    )


# With a schedule, because Lightning loses the loader's position where the optimizer asks for the number of steps.
STOPPABLE: dict[str, Any] = {
    "fitter": {"checkpoint_every": 2}, "schedule": partial(schedule, kind="linear", warmup=0.2),
}  # fmt: skip


def rebuilt(subject: Subject, run: Run) -> Any:
    """The model's structure, built anew from metadata, with the trained weights."""
    learner = subject.blank().learner
    for info in run.learner.seen:
        learner.build(info)
    learner.load_state_dict(run.learner.state_dict())
    return learner


def predicts_when_loaded(subject: Subject) -> None:
    """Structure from metadata and weights from the file are enough to predict: no state of the strategy is needed."""
    run = subject.run()
    learner = rebuilt(subject, run)
    for experience in run.experiment.stream:
        batch = experience.test.fetch(torch.arange(len(experience.test)))
        with torch.no_grad():
            before, after = (model.eval()(batch).logits for model in (run.learner, learner))
        promise(
            torch.equal(before, after),
            f"a loaded model predicts otherwise on experience {experience.index + 1}: what predictions need belongs into "
            "learner.extras, not into state_dict()",
        )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a nested state by their path."""
    if isinstance(value, dict):
        return {p: leaf for key, item in value.items() for p, leaf in flat(item, f"{path}/{key}").items()}
    return {path: value}
