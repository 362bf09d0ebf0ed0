"""Is what was forgotten lost, or only out of reach? How many steps of training bring it back, and how many it took at first.

    savings = 1 − steps to relearn / steps to learn

Ebbinghaus's measure (1885) of what is left of a memory that cannot be recalled; for networks Hetherington & Seidenberg 1989,
"Is There 'Catastrophic Interference' in Connectionist Networks?", and French 1999, "Catastrophic Forgetting in Connectionist
Networks". A step is one of the run's optimizer on a batch of the experience's training data alone: with the run's batch size
and initial learning rate, without schedule, augmentation or the strategies' own terms. Learned (or relearned) is what reaches a
level of the accuracy that the experience had right after it was learned in the run (of a perplexity: that divided by the
level). Three starts are compared, with the same batches:

* the final model: relearning,
* the model that the run had just before this experience, if models were kept: learning at first,
* the untrained model: learning from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from clplatform.data import Loader, derive_seed
from clplatform.diagnosis.layers import some
from clplatform.evaluate import MEASURES
from clplatform.learner import Learner
from clplatform.module.mode import eval_mode
from clplatform.types import MASKED, Experience, Stream

TEST_SAMPLES = 500  # that decide whether the level is reached


def steps_to_reach(
    learner: Learner, stream: Stream, experience: Experience, target: float, most: int, seed: int, batch_size: int
) -> tuple[int | None, float]:
    """Train `learner`, in place, until its score on the experience's test data reaches the target.

    The score is looked at after every step at first, then after every tenth part of the steps so far.

    Returns:
        The steps (None: more than `most`), and the score at the start.
    """
    torch.manual_seed(derive_seed(seed, "relearning", experience.index))  # dropout
    higher, metric = stream.info.higher_is_better, stream.info.primary_metric
    test = some(experience.test, TEST_SAMPLES, seed, experience.index, "relearning")
    # As `evaluate.evaluate_row` does, of one experience.
    measure: Callable[..., Any] = MEASURES[stream.info.problem]

    def score() -> float:
        return measure(learner, stream, test, batch_size)[metric]

    def reached(value: float) -> bool:
        return value >= target if higher else value <= target

    start = score()
    if reached(start):
        return 0, start
    optimizer = learner.optimizer_factory(learner.parameter_groups())
    batches, due = forever(learner, experience, seed), 1
    learner.train()
    for step in range(1, most + 1):
        optimizer.zero_grad()
        batch = next(batches)
        learner.task_loss(batch, learner.run(batch)).backward()
        optimizer.step()
        if step >= due:
            due = max(step + 1, round(1.1 * step))
            if reached(score()):
                return step, start
    return None, start


def forever(learner: Learner, experience: Experience, seed: int) -> Iterator[Any]:
    """Batches of the experience's training data, epoch after epoch, each in an order of its own."""
    loader = Loader(
        experience.train, learner.batch_size, shuffle=True, seed=derive_seed(seed, experience.index, "relearning")
    )
    while True:
        for batch in loader:
            yield {name: value.to(learner.device) for name, value in batch.items()}


def obstacle(learner: Learner, experience: Experience) -> str | None:
    """Why plain training would not say anything about this model; None: it would.

    It trains the bare model. Where strategies answer with something else (prototypes, prompts, experts, an average), what
    is trained is not what answers.
    """
    if not any(p.requires_grad for p in learner.parameters()):
        return "no part of the model is trained by gradients"
    batch = next(iter(learner.batches(some(experience.test, 16, "obstacle"))))
    with torch.no_grad(), eval_mode(learner):
        wrapped, bare = learner(batch).logits, learner.run(batch).logits
    learner.flops.drop()
    if wrapped.shape == bare.shape and torch.allclose(wrapped.clamp_min(MASKED), bare.clamp_min(MASKED), atol=1e-4):
        return None
    names = [learner.chain.names[s] for s in learner.chain.open("forward")]
    return f"{' and '.join(names)} answers with more than backbone and head, which plain training would not reach"


def target_of(old: float, level: float, higher_is_better: bool) -> float:
    """The score at which an experience counts as learned."""
    return level * old if higher_is_better else old / level


def savings(relearned: int | None, learned: int | None, most: int) -> tuple[float | None, bool]:
    """The savings, and whether they are only a lower bound (learning took more than `most` steps)."""
    if relearned is None or learned == 0:
        return None, False
    return (1 - relearned / most, True) if learned is None else (1 - relearned / learned, False)
