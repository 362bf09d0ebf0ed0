"""Avalanche's plugins as a strategy of ours. (Plugin by plugin against Avalanche's own loop: tests/avalanche_host.)"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import from_page
from text_world import make_text_experiment
from world import TinyStream, make_experiment, same, weights

from clplatform.schedule import schedule
from clplatform.strategy.base import Strategy
from clplatform.types import ClplatformError

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


class Watch(Strategy):
    """Sees the batches and the learning rates of a run."""

    def __init__(self) -> None:
        self.sources: list[list[int]] = []
        self.rates: list[float] = []

    def loss(self, learner: Any, batch: Any, output: Any) -> dict[str, Any]:
        self.sources.append(batch["source"].tolist())
        self.rates.append(learner.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])
        return {}


def run(folder: Path, *plugins: Any, changes: dict[str, Any] | None = None, first: Any = (), **options: Any) -> Any:
    """A run with these plugins, after the strategies `first`."""
    strategies = {**dict(first), "avalanche": from_page("avalanche", plugins=list(plugins), **(changes or {}))}
    experiment = make_experiment(folder, strategies, **options)
    experiment.run()
    return experiment


def test_avalanche_is_not_loaded_before_it_is_needed() -> None:
    code = """
import sys, yaml
from clplatform.build import make
from clplatform.config import conf_dir
import clplatform.strategy.avalanche
make(yaml.safe_load((conf_dir() / "strategy" / "avalanche.yaml").read_text())["avalanche"])
assert "avalanche" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nodes_inside_the_page_are_left_for_the_host() -> None:
    node = {"_target_": "avalanche.training.plugins.ReplayPlugin", "mem_size": 5}
    assert from_page("avalanche", plugins=[node]).plugins == [node]  # type: ignore[attr-defined]


def test_a_plugin_that_does_nothing_changes_nothing(tmp_path: Path) -> None:
    """Every hook is called, and the weights are those of plain fine-tuning, with another optimizer, too."""
    options: dict[str, Any] = {
        "dropout": 0.2,
        "optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        "schedule": partial(schedule, kind="linear", warmup=0.2),
        "trainer": {"max_epochs": 3, "gradient_clip_val": 0.5},
    }
    nothing = run(tmp_path / "a", {"_target_": "avalanche.core.SupervisedPlugin"}, **options)
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}, **options)
    plain.run()
    assert same(weights(nothing.learner), weights(plain.learner))
    assert nothing.results.cost["samples"] == plain.results.cost["samples"]


def test_a_plugin_s_loader_is_the_one_that_is_trained_with(tmp_path: Path) -> None:
    watch = Watch()
    experiment = run(tmp_path, {"replay": {"mem_size": 20, "batch_size_mem": 3}}, first={"watch": watch}.items())
    assert [len(s) for s in watch.sources] == 8 * [8] + 16 * [11]
    assert watch.sources[0] == 8 * [0]
    assert watch.sources[-1] == 11 * [2]  # the second strategy brings them
    assert experiment.results.cost["samples"] == 64 + 16 * 11
    assert experiment.results.cost["stored_samples"] == 20


def test_the_number_of_steps_is_that_of_the_plugin_s_loader(tmp_path: Path) -> None:
    """GDumb trains on its memory alone: a linear schedule ends where it ends."""
    watch = Watch()
    run(
        tmp_path, {"gdumb": {"mem_size": 16}}, first={"watch": watch}.items(),
        schedule=partial(schedule, kind="linear", warmup=0.0),
    )  # fmt: skip
    assert watch.rates == pytest.approx(3 * [0.1, 0.075, 0.05, 0.025])


def test_with_strategies_of_ours(tmp_path: Path) -> None:
    """Each acts, in either order: the plugin sees the rows of our replay when that comes first."""
    replay = from_page("replay")
    both = run(tmp_path / "a", {"lwf": {"alpha": 5.0}}, first={"replay": replay}.items())
    alone = run(tmp_path / "b", {"lwf": {"alpha": 5.0}})
    ours = make_experiment(tmp_path / "c", {"replay": from_page("replay")})
    ours.run()
    assert not same(weights(both.learner), weights(alone.learner))
    assert not same(weights(both.learner), weights(ours.learner))
    reverse = {"avalanche": from_page("avalanche", plugins=["lwf"]), "replay": from_page("replay")}
    after = make_experiment(tmp_path / "d", reverse)
    after.run()
    assert after.results.cost["stored_samples"] == 20
    assert after.results.cost["samples"] == 64 + 2 * 128


def test_it_sees_batches_as_they_are_augmented(tmp_path: Path) -> None:
    """LwF's teacher is asked about what the model is trained on: at the start of an experience they agree."""

    def flipped(batch: Any, generator: Any) -> Any:
        return {**batch, "pixel_values": batch["pixel_values"].flip(-1)}

    seen = []

    class Look(Strategy):
        def loss(self, learner: Any, batch: Any, output: Any) -> dict[str, Any]:
            host = learner.chain.strategies["avalanche"].host.hosted
            seen.append(torch.equal(host.mb_x, batch["pixel_values"]))
            return {}

    run(tmp_path, "lwf", first={"look": Look()}.items(), augment=flipped)
    assert seen == 24 * [True]


def test_early_stopping_needs_validation_data_and_says_how(tmp_path: Path) -> None:
    stop = {"early_stopping": {"patience": 1, "val_stream_name": "validation_stream"}}
    with pytest.raises(ClplatformError, match="validation_fraction and strategy.avalanche.evaluate_every=1"):
        run(tmp_path, stop)


def test_early_stopping_stops(tmp_path: Path) -> None:
    stop = {"early_stopping": {"patience": 1, "val_stream_name": "validation_stream"}}
    experiment = run(tmp_path, stop, changes={"evaluate_every": 1}, trainer={"max_epochs": 20})
    assert 24 <= experiment.results.cost["steps"] < 3 * 20 * 4


def test_accumulated_gradients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match="accumulate_grad_batches"):
        run(tmp_path, "lwf", trainer={"accumulate_grad_batches": 2})


def test_two_that_own_the_loss_are_refused() -> None:
    from clplatform.strategy.base import Chain

    with pytest.raises(ValueError, match="avalanche and derpp cannot be combined: both replace the task loss"):
        Chain({"avalanche": from_page("avalanche"), "derpp": from_page("derpp")})


def test_without_task_labels_a_multi_head_model_is_not_guessed(tmp_path: Path) -> None:
    greedy = {"gss_greedy": {"mem_size": 40, "input_size": [1, 1, 12]}}
    with pytest.raises(ClplatformError, match="calls the model without task labels"):
        run(tmp_path, greedy, stream=TinyStream(scenario="task_incremental"))


def test_a_layer_that_is_replaced_is_refused(tmp_path: Path) -> None:
    experiment = run(tmp_path, "lwf")
    model = experiment.learner.chain.strategies["avalanche"].host.hosted.model
    with pytest.raises(ClplatformError, match=r"replaces the layer head\.linear"):
        setattr(model, "head.linear", torch.nn.Linear(16, 3))


def test_costs_are_counted(tmp_path: Path) -> None:
    experiment = run(tmp_path, {"ewc": {"ewc_lambda": 1.0}}, {"gdumb": {"mem_size": 12}})
    numbers = [sum(p.numel() for n, p in experiment.learner.named_parameters())]  # the last head
    per_head = [16 * 12 + 16 + (16 + 1) * k for k in (2, 4, 6)]
    assert numbers == [per_head[2]]
    # importances and weights of three experiences, which Avalanche widens with the head, and GDumb's initial model
    assert experiment.results.cost["extra_parameters"] == 2 * 3 * per_head[2] + per_head[2]
    assert experiment.results.cost["stored_samples"] == 12
    assert experiment.results.cost["buffer_bytes"] == 12 * (12 * 4 + 3 * 8)  # as a memory of ours


@pytest.mark.parametrize("scenario", ["image", "text"])
def test_stored_samples_take_as_many_bytes_as_in_a_memory_of_ours(scenario: str, tmp_path: Path) -> None:
    make = make_text_experiment if scenario == "text" else make_experiment
    found = []
    for name, changes in (("avalanche", {"plugins": [{"replay": {"mem_size": 20}}]}), ("replay", {"capacity": 20})):
        experiment = make(tmp_path / name, {name: from_page(name, **changes)}, trainer={"max_epochs": 1})
        experiment.run()
        found.append({key: experiment.results.cost[key] for key in ("stored_samples", "buffer_bytes")})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"replay": {"mem_size": 5}}, r"plugins\[0\]\.mem_size=5 is smaller than the 6 classes of stream=tiny"),
        ({"icarl": {"memory_size": 5}}, r"plugins\[0\]\.memory_size=5 is smaller than"),
        (
            {
                "replay": {
                    "mem_size": 5,
                    "storage_policy": {
                        "_target_": "avalanche.training.storage_policy.ReservoirSamplingBuffer",
                        "max_size": 5,
                    },
                }
            },
            r"plugins\[0\]\.storage_policy\.max_size=5 is smaller than",
        ),
    ],
)
def test_a_memory_smaller_than_the_number_of_classes_is_refused(plugin: dict[str, Any], said: str) -> None:
    with pytest.raises(ClplatformError, match=said):
        from_page("avalanche", plugins=[plugin]).check(TinyStream().info)


def test_a_memory_that_is_large_enough_or_of_each_class_is_not_refused() -> None:
    for plugin in ({"replay": {"mem_size": 6}}, {"icarl": {"memory_size": 2, "fixed_memory": False}}, "replay", "lwf"):
        from_page("avalanche", plugins=[plugin if plugin != "lwf" else {"lwf": {}}]).check(TinyStream().info)


def test_a_page_elsewhere_may_bring_its_own_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_plugins.py").write_text(
        "from avalanche.core import SupervisedPlugin\n\n\n"
        "class Halve(SupervisedPlugin):\n"
        "    def after_backward(self, strategy, **kwargs):\n"
        "        for p in strategy.model.parameters():\n"
        "            p.grad /= 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half = run(tmp_path / "a", {"_target_": "my_plugins.Halve"})
    slow = make_experiment(
        tmp_path / "b",
        {"finetuning": from_page("finetuning")},
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )
    slow.run()
    a, b = weights(half.learner), weights(slow.learner)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_whole_batches_are_read_where_no_plugin_brings_a_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clplatform.stream.avalanche import Samples

    read = []
    one = Samples.__getitem__
    monkeypatch.setattr(Samples, "__getitem__", lambda self, row: (read.append(row), one(self, row))[1])
    run(tmp_path / "a", "lwf")
    assert read == []
    run(tmp_path / "b", {"replay": {"mem_size": 20}})
    assert len(read) >= 16 * 16  # steps of the second and third experience, samples of the batch and of the memory


def test_an_optimizer_that_a_plugin_puts_in_place_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an experience, and in the middle of one: from its second epoch on nothing moves."""
    (tmp_path / "rebinding.py").write_text(
        "import torch\nfrom avalanche.core import SupervisedPlugin\n\n\n"
        "class Rebind(SupervisedPlugin):\n"
        "    def before_training_exp(self, strategy, **kwargs):\n"
        "        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1, momentum=0.9)\n\n"
        "    def before_training_epoch(self, strategy, **kwargs):\n"
        "        if strategy.clock.train_exp_epochs == 1:\n"
        "            strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rebound = run(tmp_path / "a", {"_target_": "rebinding.Rebind"}, stream=TinyStream(1))
    one = make_experiment(
        tmp_path / "b", {"finetuning": from_page("finetuning")}, stream=TinyStream(1), trainer={"max_epochs": 1}
    )
    one.run()
    assert rebound.results.cost["steps"] == 8
    assert same(weights(rebound.learner), weights(one.learner))


def test_what_cannot_run_is_refused_before_anything_is_built() -> None:
    from clplatform.strategy.base import Chain

    with pytest.raises(ClplatformError, match=r"plugins\[0\]=reply: .* did you mean replay"):
        Chain({"avalanche": from_page("avalanche", plugins=["reply"])}).check(TinyStream().info)


def test_plugins_see_gradients_before_they_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "norms.py").write_text(
        "import torch\nfrom avalanche.core import SupervisedPlugin\n\n\n"
        "class Norms(SupervisedPlugin):\n"
        "    seen = []\n\n"
        "    def note(self, strategy, **kwargs):\n"
        "        self.seen.append(torch.cat([p.grad.flatten() for p in strategy.model.parameters()]).norm().item())\n\n"
        "    after_backward = after_update = note\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "a", {"_target_": "norms.Norms"}, trainer={"gradient_clip_val": 0.01, "precision": "bf16-mixed"})
    seen = torch.tensor(sys.modules["norms"].Norms.seen).view(-1, 2)
    assert len(seen) == 24
    assert (seen[:, 0] > 0.01).any()
    assert (seen[:, 1] < 0.0101).all()
