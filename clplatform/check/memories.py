"""What holds of a memory of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplatform.check.promise import DoesNotApply, promise
from clplatform.check.subject import Run, Subject
from clplatform.check.world import TinyStream, make_learner, tiny_vit
from clplatform.data import Loader
from clplatform.memory.buffer import Buffer


def memories(run: Run) -> dict[str, Any]:
    found = {name: b for name, s in run.strategies.items() if isinstance(b := getattr(s, "buffer", None), Buffer)}
    if not found:
        raise DoesNotApply("it has no attribute buffer that is a clplatform.memory.buffer.Buffer")
    return found


def memory(subject: Subject) -> None:
    """Its memory never holds more than its capacity, nor a sample twice, and whole samples with their labels."""
    run = subject.run(trainer={"max_epochs": 1})  # a sample may come again in another epoch
    found = memories(run)
    problems = run.seen.problems.get("memory", [])
    promise(not problems, "; ".join(problems[:2]))
    samples: dict[int, tuple[Tensor, int]] = {}
    for e in run.experiment.stream:
        batch = e.train.fetch(torch.arange(len(e.train)))
        for i, x, y in zip(batch["index"], batch["pixel_values"], batch["labels"], strict=True):
            samples[int(i)] = x, int(y)
    for name, buffer in found.items():
        promise(len(buffer) <= buffer.capacity, f"{name} holds {len(buffer)} samples, capacity={buffer.capacity}")
        rows = {n: buffer.column(n).cpu() for n in ("index", "pixel_values", "labels")}
        index = rows["index"].tolist()
        twice = sorted({i for i in index if index.count(i) > 1})
        promise(not twice, f"{name} holds the sample {twice[:1]} more than once: does it store its own replayed rows?")
        for i, x, y in zip(index, rows["pixel_values"], rows["labels"], strict=True):
            promise(torch.equal(samples[i][0], x), f"{name}: the stored sample {i} is not the one of the stream")
            promise(samples[i][1] == int(y), f"{name}: the stored sample {i} has another label than in the stream")


def memory_of_text(subject: Subject) -> None:
    """Texts of different lengths come back from its memory as they went in."""
    run = subject.run(text=True, scenario="task_incremental")
    texts: dict[int, list[int]] = {}
    for e in run.experiment.stream:
        batch = e.train.fetch(torch.arange(len(e.train)))
        for i, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True):
            texts[int(i)] = ids[mask.bool()].tolist()
    for name, buffer in memories(run).items():
        stored = buffer.take(torch.arange(len(buffer)))
        for i, ids, mask in zip(stored["index"], stored["input_ids"], stored["attention_mask"], strict=True):
            promise(ids[mask.bool()].tolist() == texts[int(i)], f"{name}: the stored text {int(i)} is another")
            promise(not ids[~mask.bool()].any(), f"{name}: the stored text {int(i)} goes on behind its end")


def memory_is_uniform(subject: Subject) -> None:
    """A memory whose `policy` is `reservoir` is a uniform sample of what arrived (χ² over 400 fillings, p > 10⁻⁵)."""
    buffers = memories(subject.run())
    names = [name for name, b in buffers.items() if getattr(b, "policy", None) == "reservoir"]
    if not names:
        raise DoesNotApply("its memory does not claim to be uniform")
    from scipy.stats import chi2

    n, capacity, times = 6, 3, 400
    counts = {name: torch.zeros(n, dtype=torch.float64) for name in names}
    for seed in range(times):
        for name, stored in filled(subject, names, n=n, capacity=capacity, seed=seed).items():
            promise(len(stored) == capacity, f"{name}: {len(stored)} samples after {n}, capacity={capacity}")
            counts[name][stored] += 1
    p = capacity / n
    for name, count in counts.items():
        z2 = ((count - times * p) ** 2 / (times * p * (1 - p))).sum() * (n - 1) / n
        probability = float(chi2.sf(float(z2), n - 1))
        shares = ", ".join(f"{share:.0%}" for share in (count / times).tolist())
        promise(
            probability > 1e-5,
            f"{name}: of {n} samples that arrive one after the other, each should stay in {p:.0%} of the cases; they stay "
            f"in {shares}",
        )


def filled(subject: Subject, names: list[str], *, n: int, capacity: int, seed: int) -> dict[str, Tensor]:
    """Positions of the samples that are in each memory after one experience of n samples in batches of two."""
    stream = TinyStream(1, scenario=subject.scenario, per_class=n // 2)
    strategies = subject.make(capacity=capacity)
    learner = make_learner(stream, strategies, backbone=tiny_vit() if subject.transformer else None)
    subject.tune(learner)
    chain, experience = learner.chain, stream[0]
    learner.generator.manual_seed(seed)
    learner.build(experience.info)
    learner.experience = experience
    chain.before_experience(learner, experience)
    data = chain.train_data(learner, experience, experience.train)
    for stage in chain.stages(learner, experience):
        chain.before_stage(learner, experience, stage)
        loader = chain.loader(learner, Loader(data if stage.data is None else stage.data, 2))
        learner.stage_steps = len(loader)
        by_hand(learner, loader)
        chain.after_stage(learner, experience, stage)
    chain.after_experience(learner, experience)
    return {name: strategies[name].buffer.column("index") for name in names}  # type: ignore[attr-defined]


def by_hand(learner: Any, loader: Any) -> None:
    """One epoch without Lightning, whose start takes longer than these few steps."""
    optimizer = learner.chain.optimizer(learner) or learner.make_optimizer()
    learner.train()
    learner.chain.before_epoch(learner)
    for i, batch in enumerate(loader):
        optimizer.zero_grad()
        loss = learner.training_step(batch, i)
        if loss.requires_grad:
            loss.backward()
            learner.chain.edit_gradients(learner)
            optimizer.step()
        learner.chain.after_step(learner)
        learner.chain.after_batch(learner, *learner._last)
    learner.chain.after_epoch(learner)
