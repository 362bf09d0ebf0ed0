"""What is checked. Each function says in its first line what a strategy promises, and raises `Broken` where it does not
keep it, or `DoesNotApply`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clplatform import checkpoint
from clplatform.check.guard import Guard
from clplatform.check.subject import Run, Subject, tensors
from clplatform.check.world import TinyBackbone, TinyStream, make_learner, same, tiny_vit
from clplatform.data import Loader, TensorData
from clplatform.memory.buffer import Buffer
from clplatform.schedule import schedule
from clplatform.strategy.base import FAMILIES, Chain
from clplatform.types import ClplatformError


class Broken(Exception):
    """A promise is not kept; the message says which, where and why that is bad."""


class DoesNotApply(Exception):
    """There is nothing to check here; the message says why."""


def promise(kept: bool, message: str) -> None:
    if not kept:
        raise Broken(message)


# -- what it declares --------------------------------------------------------------------------------------------------


def declares(subject: Subject) -> None:
    """Family and needs are known ones, and an exclusion has its reason."""
    known = {"task_ids", "boundaries", "memory", "pretrained", "hidden_states", "transformer", "past_data"}
    for name, s in zip(subject.names, subject.samples, strict=True):
        promise(s.family in FAMILIES, f"{name}: family={s.family!r} is none of {', '.join(sorted(FAMILIES))}")
        unknown = sorted(s.needs - known)
        promise(not unknown, f"{name}: needs has {unknown}, of which nothing is known; there is {sorted(known)}")
        promise(bool(s.why_not) or not s.excludes, f"{name}: it excludes others and why_not does not say why")


def first_experience(subject: Subject) -> None:
    """In the first experience it is plain fine-tuning, bit for bit, or says that it is not."""
    equal = same(subject.run().after[0], subject.run(who="finetuning").after[0])
    claimed = all(s.first_experience_is_finetuning for s in subject.samples)
    if claimed:
        promise(equal, "first_experience_is_finetuning is True, but the weights differ from those of fine-tuning")
        return
    promise(not equal, "first_experience_is_finetuning is False, but the weights equal those of fine-tuning")
    silent = [s for s in subject.samples if not s.first_experience_is_finetuning and not s.why_not]
    promise(not silent, "first_experience_is_finetuning is False, and why_not does not say why")


def cost(subject: Subject) -> None:
    """`cost()` is what it holds: numbers beside the model and added to it, and the bytes of a memory."""
    run, plain = subject.run(), subject.run(who="finetuning").learner
    model = {id(t) for t in run.learner.state_dict(keep_vars=True).values()}
    buffers = [b for s in run.strategies.values() if (b := getattr(s, "buffer", None)) is not None]
    seen = {id(run.learner), *map(id, buffers)}
    ours = frozenset({"clplatform", *(type(s).__module__.partition(".")[0] for s in run.strategies.values())})
    held = [t for s in run.strategies.values() for t in tensors(vars(s), seen, ours) if id(t) not in model]
    added = floats(run.learner.state_dict().values()) - floats(plain.state_dict().values())
    declared = run.learner.chain.cost()
    found = floats(held) + added
    promise(
        declared.get("extra_parameters", 0) == found,
        f"cost() says extra_parameters={declared.get('extra_parameters', 0)}, but {found} numbers are held",
    )
    if not buffers:
        return
    rows = [t for b in buffers for t in tensors(vars(b).get("rows", {}), set())]
    promise(
        declared.get("buffer_bytes", 0) == sum(t.nbytes for t in rows),
        f"cost() says buffer_bytes={declared.get('buffer_bytes', 0)}, but the memory has {sum(t.nbytes for t in rows)}",
    )
    promise(
        declared.get("stored_samples", 0) == sum(map(len, buffers)),
        f"cost() says stored_samples={declared.get('stored_samples', 0)}, but there are {sum(map(len, buffers))}",
    )


def floats(values: Any) -> int:
    return sum(t.numel() for t in values if t.is_floating_point())


# -- what it does ------------------------------------------------------------------------------------------------------


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


def learns_text(subject: Subject) -> None:
    """It learns from batches of text (dicts of `input_ids` and `attention_mask` of varying length)."""
    least = 0.7 if "pretrained" in subject.needs else 0.9  # random weights are not what it is for
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


# -- what can be repeated, stopped and restored ------------------------------------------------------------------------


def reproducible(subject: Subject) -> None:
    """The same seed gives the same weights and the same accuracy matrix."""
    once, again = subject.run(), subject.run(again=1)
    promise(same(once.after[1], again.after[1]), "two runs with one seed give different weights")
    promise(once.results.matrix == again.results.matrix, "two runs with one seed give different accuracies")


def state(subject: Subject) -> None:
    """Its state goes through a file without unpickling, and comes back complete."""
    run, folder = subject.run(), subject.folder()
    before = flat(run.learner.chain.state_dict())
    try:
        checkpoint.save(folder / "x.ckpt", {"strategy": run.learner.chain.state_dict()})
        loaded = checkpoint.load(folder / "x.ckpt")
    except Exception as error:
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
    whole = subject.run(**STOPPABLE)
    for batch, where in ((5, "in the middle of the second experience"), (0, "after the first experience")):
        folder = subject.folder()
        if not subject.new_run(folder=folder, kill=batch, **STOPPABLE).killed:
            continue  # it trains nothing by gradients, so that there is no batch to stop after
        resumed = subject.new_run(folder=folder, resume=True, **STOPPABLE)
        promise(
            same(whole.after[1], resumed.after[-1]),
            f"killed {where}, it went on to other weights: something is missing from state_dict() or drawn from "
            "another generator than learner.generator",
        )
        promise(whole.results.matrix == resumed.results.matrix, f"killed {where}, it went on to other accuracies")


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


# -- what it must not touch --------------------------------------------------------------------------------------------


def reads_only_what_it_may(subject: Subject) -> None:
    """It never reads the future, test data, or earlier samples that it has not declared to keep."""
    stream, guard = subject.stream(), Guard()
    stream.experiences = [guard.over(e) for e in stream.experiences]
    run = subject.blank(stream=stream)
    learn, evaluate = run._learn, run._evaluate
    past = "past_data" in subject.needs or any(
        s.family == "plugin" for s in subject.samples
    )  # whose memory refers to it

    def learn_guarded(experience: Any, **how: Any) -> None:
        train = {(i, "train") for i in range(experience.index + 1) if past or i == experience.index}
        with guard.only(train | {(experience.index, "validation")}):
            learn(experience, **how)

    def evaluate_guarded() -> None:
        with guard.only(None):
            evaluate()

    run._learn, run._evaluate = learn_guarded, evaluate_guarded
    run.run()
    found = sorted(set(guard.violations))
    promise(not found, f"it read {'; '.join(found[:3])}")


def task_ids_stay_hidden(subject: Subject) -> None:
    """Where the stream hides task ids, those of the rows are not used."""
    if subject.scenario == "task_incremental":
        raise DoesNotApply("it needs task ids")
    stream = subject.stream()
    wrong = []
    for e in stream.experiences:
        splits = {}
        for split in ("train", "validation", "test"):
            columns = dict(getattr(e, split).columns)
            columns["task_labels"] = 1 + columns["index"] % 5
            splits[split] = TensorData(columns)
        wrong.append(replace(e, **splits))
    stream.experiences = wrong
    run = subject.new_run(stream=stream)
    promise(same(run.after[1], subject.run().after[1]), "with other task ids on the rows it learns other weights")
    promise(run.results.matrix == subject.run().results.matrix, "with other task ids on the rows it predicts otherwise")


def leaves_the_model_as_it_was(subject: Subject) -> None:
    """Passes over data before and after an experience leave batch-norm statistics and every module's mode alone."""
    options: dict[str, Any] = {} if subject.transformer else {"backbone": TinyBackbone(0.2, norm=True)}
    experiment = subject.blank(**options)
    chain, learner, found = experiment.learner.chain, experiment.learner, []
    fresh = {n: b.clone() for n, b in learner.backbone.named_buffers()}

    @contextmanager
    def unchanged(door: str) -> Iterator[None]:
        modes = {m: m.training for m in learner.modules()}
        buffers = {n: b.clone() for n, b in learner.backbone.named_buffers()}
        yield
        flipped = [n or "the model" for n, m in learner.named_modules() if m in modes and modes[m] != m.training]
        if flipped:
            found.append(f"{door} leaves {flipped[0]} in another mode")
        for n, b in learner.backbone.named_buffers():
            if n in buffers and not torch.equal(b, buffers[n]) and not torch.equal(b, fresh[n]):
                found.append(f"{door} changes {n}: run passes over data in eval mode")

    for door in ("before_experience", "after_experience"):
        original = getattr(chain, door)

        def wrapped(*args: Any, _door: str = door, _original: Callable[..., None] = original) -> None:
            with unchanged(_door):
                _original(*args)

        setattr(chain, door, wrapped)
    experiment.run()
    promise(not found, "; ".join(dict.fromkeys(found)))


def batch_size_of_passes(subject: Subject) -> None:
    """What it computes in passes over data (importances, means, bases) does not depend on the batch size of the pass."""
    small, large = (state_after_one(subject, size) for size in (3, 64))
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in small.values()):
        raise DoesNotApply("its state after an experience has no numbers")
    for path, value in small.items():
        other = large.get(path)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.is_floating_point():
            promise(
                close(value, other),
                f"{path} is another where the pass has batches of 3 than where it has 64: are gradients of whole batches "
                "taken for those of samples?",
            )


def state_after_one(subject: Subject, batch_size: int) -> dict[str, Any]:
    """The state after the first experience."""
    folder = subject.folder()
    subject.new_run(folder=folder, kill=0, batch_size=batch_size)
    return flat(checkpoint.load(folder / "checkpoints" / "experience.ckpt")["strategy"])


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, or bases of one space."""
    if a.shape != b.shape:
        return False
    scale = float(torch.maximum(a.abs().max(), b.abs().max())) if a.numel() else 0.0
    if torch.allclose(a, b, rtol=1e-2, atol=1e-4 * scale):
        return True
    return a.ndim == 2 and torch.allclose(a @ a.mT, b @ b.mT, rtol=1e-2, atol=1e-4 * scale**2)


# -- its memory --------------------------------------------------------------------------------------------------------


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


CHECKS: list[Callable[[Subject], None]] = [
    declares, first_experience, acts, learns, learns_text, classes_come_back, finite, teachers, composes, reproducible,
    state, resumes, predicts_when_loaded, reads_only_what_it_may, task_ids_stay_hidden, leaves_the_model_as_it_was,
    batch_size_of_passes, cost, memory, memory_of_text, memory_is_uniform,
]  # fmt: skip


def title(check: Callable[[Subject], None]) -> str:
    """The promise, without its backticks."""
    return (check.__doc__ or check.__name__).partition("\n")[0].replace("`", "")
