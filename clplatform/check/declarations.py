"""Is what a strategy declares of itself true?"""

from __future__ import annotations

from typing import Any

from clplatform.check.promise import promise
from clplatform.check.subject import Subject, tensors
from clplatform.check.world import same
from clplatform.strategy.base import FAMILIES


def declares(subject: Subject) -> None:
    """Family and needs are known ones, and an exclusion has its reason."""
    known = {
        "task_ids", "boundaries", "memory", "pretrained", "hidden_states", "transformer", "past_data", "decoder",
        "tuning", "mergeable", "length",
    }  # fmt: skip
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
    """`cost()` is what it holds: numbers beside the model and added to it, and the bytes of a memory and of masks."""
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
    if any(s.family == "plugin" for s in subject.samples):
        return  # what a plugin stores is its own
    rows = sum(t.nbytes for b in buffers for t in tensors(vars(b).get("rows", {}), set()))
    masks = others(run.learner, held) + others(run.learner, new(run.learner, plain))
    promise(
        declared.get("buffer_bytes", 0) == rows + masks,
        f"cost() says buffer_bytes={declared.get('buffer_bytes', 0)}, but the memory has {rows}, and what else is no float "
        f"(masks, whole numbers) {masks}",
    )
    if not buffers:
        return
    promise(
        declared.get("stored_samples", 0) == sum(map(len, buffers)),
        f"cost() says stored_samples={declared.get('stored_samples', 0)}, but there are {sum(map(len, buffers))}",
    )


def floats(values: Any) -> int:
    return sum(t.numel() for t in values if t.is_floating_point())


def others(learner: Any, values: Any) -> int:
    """Bytes of what is no float and has an entry for each unit or more: shorter are counters and lists of classes."""
    least = learner.backbone.feature_size
    return sum(t.nbytes for t in values if not t.is_floating_point() and t.numel() >= least)


def new(learner: Any, plain: Any) -> list[Any]:
    """What the model has and fine-tuning's has not."""
    known = plain.state_dict().keys()
    return [t for name, t in learner.state_dict().items() if name not in known]
