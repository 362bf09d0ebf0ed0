"""What every strategy of `conf/strategy/` must keep to, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import NAMES, from_page, is_for_transformers, scenario_of
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor, nn
from world import TinyStream, make_experiment, same, tiny_vit, weights

from clplatform import checkpoint
from clplatform.strategy.base import Chain, Strategy
from clplatform.types import Batch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models this small only wait for more


class Run:
    """A finished run and its weights after each experience."""

    def __init__(self, folder: Path, strategies: dict[str, Strategy], make: Callable[..., Any], **options: Any) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.experiment = make(folder, strategies, **options)
        self.experiment.observers = [self]
        self.experiment.run()
        self.learner, self.results = self.experiment.learner, self.experiment.results
        self.strategy = next(reversed(strategies.values()))

    def start_experience(self, *args: Any) -> None: ...

    def finish_experience(self, info: Any, results: Any, learner: Any) -> None:
        if info is not None:
            self.after.append(weights(learner))


Runner = Callable[..., Run]


def adam() -> dict[str, Any]:
    """What a Transformer learns with."""
    return {"optimizer": partial(torch.optim.AdamW, lr=0.01)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run of these strategies, made once for the whole module."""
    made: dict[Any, Run] = {}

    def run(
        *names: str, again: bool = False, text: bool = False, scenario: str | None = None, like: str | None = None
    ) -> Run:
        """`like`: in the world (scenario and backbone) of this strategy."""
        world = [like] if like else names
        scenario, transformer = scenario or scenario_of(*world), is_for_transformers(*world) and not text
        key = names, again, text, scenario, transformer
        if key not in made:
            stream = (TinyTextStream if text else TinyStream)(3, scenario=scenario)
            stream.experiences.pop()  # a third is known and never trained
            options: dict[str, Any] = {"stream": stream, "trainer": {"max_epochs": 8 if text or transformer else 4}}
            options |= adam() if text or transformer else {"dropout": 0.2}
            if transformer:
                options["backbone"] = tiny_vit()
            folder = tmp_path_factory.mktemp("run")
            make = make_text_experiment if text else make_experiment
            made[key] = Run(folder, {name: from_page(name) for name in names}, make, **options)
        return made[key]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_first_experience_is_fine_tuning_or_it_says_why_not(name: str, runs: Runner) -> None:
    strategy, equal = runs(name).strategy, same(runs(name).after[0], runs("finetuning", like=name).after[0])
    assert equal == strategy.first_experience_is_finetuning
    assert equal or strategy.why_not


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"finetuning"}))
def test_second_experience_differs_from_fine_tuning(name: str, runs: Runner) -> None:
    assert not same(runs(name).after[1], runs("finetuning", like=name).after[1])


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights_and_matrix(name: str, runs: Runner) -> None:
    once, again = runs(name), runs(name, again=True)
    assert once is not again
    assert same(once.after[1], again.after[1])
    assert once.results.matrix == again.results.matrix


# -- state ------------------------------------------------------------------------------------------------------


def restored(name: str, run: Run, folder: Path) -> Any:
    """A learner built anew whose weights and strategy state went through a file."""
    path = folder / "x.ckpt"
    checkpoint.save(path, {"weights": run.learner.state_dict(), "strategy": run.learner.chain.state_dict()})
    state = checkpoint.load(path)  # without unpickling
    options: dict[str, Any] = {"backbone": tiny_vit()} if is_for_transformers(name) else {"dropout": 0.2}
    learner = make_experiment(folder, {name: from_page(name)}, stream=run.experiment.stream, **options).learner
    for experience in run.experiment.stream:
        learner.build(experience.info)
    learner.load_state_dict(state["weights"])
    learner.chain.load_state_dict(state["strategy"])
    return learner


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a nested state by their path."""
    if isinstance(state, dict):
        return {p: leaf for key, value in state.items() for p, leaf in flat(value, f"{path}/{key}").items()}
    return {path: state}


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name: str, runs: Runner, tmp_path: Path) -> None:
    before, after = (flat(x.chain.state_dict()) for x in (runs(name).learner, restored(name, runs(name), tmp_path)))
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert torch.equal(value, after[path]) if isinstance(value, Tensor) else value == after[path], path


@pytest.mark.parametrize("name", NAMES)
def test_restored_it_goes_on_the_same(name: str, runs: Runner, tmp_path: Path) -> None:
    """Loss terms and gradients of the first step of a third experience."""
    third, found = TinyStream(3, scenario=scenario_of(name))[2], []
    copy = restored(name, runs(name), tmp_path)
    original = runs(name, again=True).learner  # a run of its own, since it is changed
    for learner in (original, copy):
        torch.manual_seed(3)
        learner.generator.manual_seed(3)
        learner.build(third.info)
        learner.experience = third
        learner.chain.before_experience(learner, third)
        learner.train()
        loss = learner.training_step(third.train.fetch(torch.arange(8)), 0)
        parameters = {n: p for n, p in learner.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        named = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
        found.append({**learner.last_terms, **named})
    assert len(found[0]) >= 4  # two terms, and a classifier's weight and bias at least
    assert same(found[0], found[1])


# -- together with others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"replay"}))
def test_composes_with_replay_or_is_refused_with_a_reason(name: str, runs: Runner) -> None:
    excluded = "replay" in from_page(name).excludes
    if excluded:
        with pytest.raises(ValueError, match=f"{name} cannot be combined with replay .*: .{{10}}"):
            Chain({"replay": from_page("replay"), name: from_page(name)})
        return
    both, alone = runs("replay", name), runs("replay", like=name)
    assert both.results.status == "completed"
    assert set(both.learner.chain.state_dict()) == {"replay", name}
    if name != "finetuning":
        assert not same(both.after[1], alone.after[1])  # the strategy acts
    else:
        assert same(both.after[1], alone.after[1])
    assert not same(both.after[1], runs(name).after[1])  # and so does replay


# -- cost --------------------------------------------------------------------------------------------------------


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object of ours."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict(keep_vars=True).values()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item, seen)
    elif type(value).__module__.startswith("clplatform.") and hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_is_allocated(name: str, runs: Runner) -> None:
    """Numbers held beside the model, those added to it, and the bytes of a memory's rows."""
    run, plain = runs(name), runs("finetuning", like=name).learner
    model = {id(t) for t in run.learner.state_dict(keep_vars=True).values()}
    buffer = getattr(run.strategy, "buffer", None)
    held = [t for t in tensors(vars(run.strategy), {id(run.learner), id(buffer)}) if id(t) not in model]
    added = floats(run.learner.state_dict().values()) - floats(plain.state_dict().values())
    cost = run.strategy.cost()
    assert cost.get("extra_parameters", 0) == floats(held) + added
    if buffer is not None:
        rows = buffer.state_dict()["rows"].values()
        assert cost["buffer_bytes"] == sum(t.nbytes for t in rows)
        assert cost["stored_samples"] == len(buffer.labels) == 20 == max(len(t) for t in rows)
    assert ("buffer_bytes" in cost) == (buffer is not None)
    assert all(run.results.cost[key] == value for key, value in cost.items())


def floats(values: Any) -> int:
    return sum(t.numel() for t in values if t.is_floating_point())


# -- every kind of stream and of input ------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@pytest.mark.parametrize("name", NAMES)
def test_learns_in_every_scenario(name: str, scenario: str, runs: Runner) -> None:
    if scenario_of(name) == "task_incremental" != scenario:
        return  # refused before any training
    matrix = runs(name, scenario=scenario).results.matrix
    assert len(matrix) == 3
    assert all(value is not None for value in matrix[-1])
    assert all(matrix[i + 1][i] > 0.7 for i in range(2)), matrix  # type: ignore[operator]


@pytest.mark.parametrize("name", NAMES)
def test_learns_from_batches_of_text(name: str, runs: Runner) -> None:
    matrix = runs(name, text=True, scenario="task_incremental").results.matrix
    least = 0.7 if "pretrained" in from_page(name).needs else 0.9  # random weights are not what it is for
    assert all(matrix[i + 1][i] > least for i in range(2)), matrix  # type: ignore[operator]


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(from_page(n), "buffer")])
def test_a_memory_of_texts_holds_whole_texts(name: str, runs: Runner) -> None:
    """Texts of different lengths come back as they went in."""
    run = runs(name, text=True, scenario="task_incremental")
    known: dict[int, list[int]] = {}
    for experience in run.experiment.stream:
        batch: Batch = experience.train.columns  # type: ignore[attr-defined]
        for i, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True):
            known[int(i)] = ids[mask.bool()].tolist()
    stored = run.strategy.buffer.take(torch.arange(20))  # type: ignore[attr-defined]
    for i, ids, mask in zip(stored["index"], stored["input_ids"], stored["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == known[int(i)]
        assert not ids[~mask.bool()].any()
