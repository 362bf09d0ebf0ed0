"""Our run against Avalanche's own loop with the same plugin: same stream, batches, seeds and initial weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche_cases import CASES, Case
from avalanche_world import hosted, hosting, model_weights, stream_of
from torch import Tensor
from world import same, weights

from clplatform.types import ClplatformError

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

HOSTED = [name for name, case in CASES.items() if case.same != "no"]
CLOSE = 0.05  # of weights of up to 2


@pytest.fixture
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps Avalanche's own loop from running BiC: data that cannot be set, and an argument that PyTorch has
    dropped."""
    import avalanche.training.plugins.bic as bic
    from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
    from torch.optim.lr_scheduler import MultiStepLR

    data = property(lambda e: e._dataset, lambda e, dataset: setattr(e, "_dataset", dataset))
    monkeypatch.setattr(DatasetExperience, "dataset", data)
    monkeypatch.setattr(bic, "MultiStepLR", lambda *args, verbose, **settings: MultiStepLR(*args, **settings))


class Both:
    """A case in our run and in Avalanche's loop."""

    def __init__(self, folder: Path, case: Case, *, texts: bool = False, **options: Any) -> None:
        from avalanche_native import SHAPES, held, native_weights, run_native

        ours = hosting(folder, case, texts=texts)
        start = ours.learner.backbone
        self.backbone, self.case, self.texts = copy.deepcopy(start), case, texts
        ours.run()
        self.ours, self.our_held = model_weights(weights(ours.learner)), held(hosted(ours))
        self.matrix = ours.results.matrix
        shape = SHAPES[texts]
        theirs, self.their_accuracies = run_native(
            stream_of(case, texts=texts),
            copy.deepcopy(self.backbone),
            lambda model, optimizer: case.native(model, optimizer, shape),
            epochs=case.epochs,
            **case.options_made(),
            **options,
        )
        self.theirs, self.their_held = native_weights(theirs), held(theirs)

    def without_plugins(self) -> dict[str, Tensor]:
        """The weights after Avalanche's plain fine-tuning."""
        from avalanche_native import native_weights, run_native

        stream = stream_of(self.case, texts=self.texts)
        return native_weights(run_native(stream, self.backbone, lambda m, o: [], epochs=self.case.epochs)[0])


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.usefixtures("repaired")
@pytest.mark.parametrize("name", HOSTED)
def test_weights_and_predictions_are_avalanche_s(name: str, tmp_path: Path) -> None:
    both = Both(tmp_path, CASES[name])
    assert all(t.isfinite().all() for t in both.theirs.values())
    if CASES[name].same == "identical":
        assert same(both.ours, both.theirs)
        assert same(both.our_held, both.their_held)
        assert both.matrix[-1] == pytest.approx(both.their_accuracies, abs=1e-9)
    else:
        assert 0 < differences(both.ours, both.theirs) < CLOSE
    assert (not same(both.theirs, both.without_plugins())) == CASES[name].acts  # there is something to compare


@pytest.mark.usefixtures("repaired")
@pytest.mark.parametrize("name", [n for n in HOSTED if CASES[n].texts == "identical"])
def test_texts_too(name: str, tmp_path: Path) -> None:
    both = Both(tmp_path, CASES[name], texts=True)
    if CASES[name].same == "identical":
        assert same(both.ours, both.theirs)
        assert same(both.our_held, both.their_held)
        assert both.matrix[-1] == pytest.approx(both.their_accuracies, abs=1e-9)
    else:
        assert 0 < differences(both.ours, both.theirs) < CLOSE


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.texts == "no"])
def test_what_is_not_for_texts_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match="not for texts|cannot be hosted"):
        hosting(tmp_path, CASES[name], texts=True).run()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.same == "no"])
def test_what_cannot_be_hosted_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match=r"plugins\[0\]: \w+ cannot be hosted: it .{20}"):
        hosting(tmp_path, CASES[name]).run()


def test_the_optimizer_may_keep_its_state_as_in_avalanche(tmp_path: Path) -> None:
    case = CASES["ReplayPlugin"]
    kept = Case(case.nodes, case.native, changes={"reset_optimizer": False}, options={"reset_optimizer": False})
    one, other = Both(tmp_path / "a", kept), Both(tmp_path / "b", case)
    assert same(one.ours, one.theirs)
    assert not same(one.ours, other.ours)


def test_several_plugins_in_their_order(tmp_path: Path) -> None:
    import avalanche.training.plugins as shipped

    plugins = [{"replay": {"mem_size": 20}}, {"ewc": {"ewc_lambda": 10.0}}, "lwf"]
    case = Case(plugins, lambda m, o, s: [shipped.ReplayPlugin(20), shipped.EWCPlugin(10.0), shipped.LwFPlugin()])
    both = Both(tmp_path, case)
    assert same(both.ours, both.theirs)
    assert not same(both.ours, both.without_plugins())


def test_hooks_are_called_in_avalanche_s_order(tmp_path: Path) -> None:
    """A plugin that writes down every call, with the counters and what there is at that time."""
    from avalanche.core import SupervisedPlugin

    written: list[list[Any]] = [[], []]

    def recorder(book: list[Any]) -> SupervisedPlugin:
        def write(hook: str) -> Any:
            def call(self: Any, strategy: Any, **kwargs: Any) -> None:
                now = None if strategy.experience is None else strategy.experience.current_experience
                x = None if strategy.mbatch is None else strategy.mb_x.sum().item()
                loss = None if strategy.loss is None else tuple(strategy.loss.shape)
                clock = strategy.clock
                book.append((hook, now, clock.train_exp_epochs, clock.train_iterations, strategy.is_training, x, loss))

            return call

        hooks = [h for h in dir(SupervisedPlugin) if h.startswith(("before_", "after_")) and "eval" not in h]
        return type("Recorder", (SupervisedPlugin,), {h: write(h) for h in hooks})()

    case = Case([], lambda m, o, s: [recorder(written[1])], epochs=2)
    import avalanche.training.plugins as shipped

    shipped.RecorderPlugin = type("RecorderPlugin", (SupervisedPlugin,), {"__new__": lambda c: recorder(written[0])})  # type: ignore[attr-defined]
    try:
        Both(tmp_path, Case(["recorder"], case.native))
    finally:
        del shipped.RecorderPlugin  # type: ignore[attr-defined]
    inside = [[(h, e, n, i, t, x) for h, e, n, i, t, x, _ in book if h != "before_training"] for book in written]
    assert len(inside[0]) == 3 * (1 + 1 + 1 + 1 + 1 + 2 * (2 + 4 * 8))
    assert inside[0] == inside[1]
    assert {entry[-1] for entry in written[0] if entry[0] in ("after_forward", "before_backward")} == {(1,)}


def test_texts_are_one_tensor_for_plugins(tmp_path: Path) -> None:
    ours = hosting(tmp_path, CASES["GEMPlugin"], texts=True)
    ours.run()
    memory = hosted(ours).made[0].memory_x[0]
    assert memory.shape == (8, 2, 9)
    assert memory.dtype == torch.float32
