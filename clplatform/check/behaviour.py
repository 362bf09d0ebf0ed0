"""Does a strategy do something, and learn, whatever the stream, the input and the company?"""

from __future__ import annotations

from dataclasses import replace

import torch

from clplatform.check.promise import DoesNotApply, promise
from clplatform.check.subject import Subject
from clplatform.check.world import TinyStream, same
from clplatform.data import by_length
from clplatform.evaluate import evaluating
from clplatform.strategy.base import Chain
from clplatform.types import ClplatformError


def acts(subject: Subject) -> None:
    """From the second experience on it makes a difference, and no loss term stays at zero."""
    if subject.names == ["finetuning"]:
        raise DoesNotApply("this is fine-tuning")
    equal = same(subject.run().after[1], subject.run(who="finetuning").after[1])
    promise(not equal, "after the second experience the weights are those of fine-tuning: it does nothing")
    idle = [name for name, value in subject.run().seen.terms.items() if value == 0]
    promise(not idle, f"the loss term {', '.join(idle)} is zero in the whole second experience")


def learns(subject: Subject) -> None:
    """It learns each experience of class-, task- and domain-incremental streams."""
    least = 0.7
    for scenario in ("class_incremental", "task_incremental", "domain_incremental"):
        if subject.scenario == "task_incremental" != scenario:
            continue  # refused before any training
        matrix = subject.run(scenario=scenario).results.matrix
        promise(all(v is not None for v in matrix[-1]), f"{scenario}: an experience has no accuracy: {matrix[-1]}")
        for i in range(2):
            value = matrix[i + 1][i] or 0.0
            promise(
                value > least,
                f"{scenario}: {value:.0%} on experience {i + 1} right after it; fine-tuning reaches 100 %",
            )


def learns_without_boundaries(subject: Subject) -> None:
    """It learns a stream that says no boundaries and shows all classes from the start, unless it needs boundaries."""
    if "boundaries" in subject.needs:
        raise DoesNotApply("it needs boundaries, and is refused without")
    least, matrix = 0.7, subject.run(share=0.05).results.matrix
    for i in range(2):
        value = matrix[i + 1][i] or 0.0
        promise(value > least, f"{value:.0%} on experience {i + 1} right after it; fine-tuning reaches 100 %")


def learns_text(subject: Subject) -> None:
    """It learns from batches of text (dicts of `input_ids` and `attention_mask` of varying length)."""
    least = 0.7 if subject.tuned or "pretrained" in subject.needs else 0.9  # random weights are not what it is for
    matrix = subject.run(text=True, scenario="task_incremental").results.matrix
    for i in range(2):
        value = matrix[i + 1][i] or 0.0
        promise(value > least, f"{value:.0%} on experience {i + 1} right after it; fine-tuning reaches 100 %")


def classes_come_back(subject: Subject) -> None:
    """Where classes come back, no second classifier is made for them: there is one logit for each class seen."""
    stream = TinyStream(2, scenario=subject.scenario)
    first, second = stream.experiences
    stream.experiences.append(replace(first, index=2, name="e1 again", n_seen_classes=second.n_seen_classes))
    stream.info = replace(stream.info, n_experiences=3, classes_per_experience=(2, 2, 2))
    try:
        run = subject.new_run(stream=stream)
    except ClplatformError as error:
        raise DoesNotApply(f"refused: {error}") from None
    batch = first.test.fetch(torch.arange(4))
    with torch.no_grad():
        shape = tuple(run.learner.eval()(batch).logits.shape)
    expected = (4, stream.experiences[-1].n_seen_classes)
    promise(shape == expected, f"logits {list(shape)} where {list(expected)} are expected: one for each class seen")


def finite(subject: Subject) -> None:
    """Every loss term and every gradient is a finite number."""
    found = subject.run().seen.problems.get("finite", [])
    promise(not found, "; ".join(found[:3]))


def teachers(subject: Subject) -> None:
    """A copy of the model that it keeps (a teacher) is in eval mode while the model trains."""
    found = subject.run().seen.problems.get("teachers", [])
    promise(not found, f"{'; '.join(found[:2])}: its dropout and batch norm would make targets noisy")


def composes(subject: Subject) -> None:
    """Beside replay it still acts, or is refused with a reason."""
    if "replay" in subject.names:
        raise DoesNotApply("replay is part of it")
    try:
        Chain(subject.chosen("with replay"))
    except ValueError as error:
        promise(len(str(error)) > 40, f"refused without a reason: {error}")
        return
    both = subject.run(who="with replay")
    promise(set(both.learner.chain.state_dict()) == {"replay", *subject.names}, "a part of the state is missing")
    promise(not same(both.after[1], subject.run().after[1]), "replay beside it changes nothing")


def evaluates_what_is_there(subject: Subject) -> None:
    """What is kept between evaluations (features of a frozen backbone) is what the model would compute now."""
    run = subject.run()
    for experience in run.experiment.stream:
        data, size = experience.test, run.experiment.fitter.eval_batch_size
        with evaluating(run.learner):
            kept = [run.learner(batch).logits for batch in run.learner.evaluation_batches(data, size)]
            fresh = [run.learner(batch).logits for batch in run.learner.batches(by_length(data)[0], batch_size=size)]
        promise(
            all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True)),
            f"it is evaluated on experience {experience.index + 1} with features that the backbone had before: "
            "learner.frozen_features is for backbones that nobody trains any more",
        )
