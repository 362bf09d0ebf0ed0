"""The console script: sub-commands are told apart here; everything else goes to Hydra."""

from __future__ import annotations

import difflib
import os
import sys

from clplatform.types import ClplatformError

HELP = """clplatform: continual learning on Transformers, from a configuration to a forgetting report

  clplatform [settings]              one run; without settings the quickstart (digits, a small ViT, replay)
  clplatform -m [settings]           a sweep: several values with commas, e.g. strategy=ewc,replay seed=0,1,2
                                     sweep=local_parallel, slurm, ray: jobs side by side; sweep=optuna: a search
  clplatform resume RUN              go on where a run stopped, to the same numbers
  clplatform update RUN DATA         teach a trained model new data as its next experience (a new run; RUN stays)
  clplatform report PATH...          (re)write the report of a run; compare several runs or a sweep
                                     --watch: the matrix, losses and time left of what runs in another process
  clplatform dashboard PROJECT       a workspace and a report in Weights & Biases, for the runs of a project
  clplatform diagnose RUN            why it has forgotten: head bias, drift of the features, what can be relearned
  clplatform predict RUN [INPUT]     classify new samples (text lines, CSV, JSONL, images, .npy; - reads standard input)
  clplatform check strategy=NAME     does a strategy, ours or yours, keep to what every strategy must?
  clplatform list [KIND]             what there is: streams, backbones, heads, strategies, metrics, experiments, ...

Settings
  stream=split_digits  backbone=vit_tiny  head=single  strategy=replay or strategy=[replay,lwf]
  tuning=lora  tuning.rank=8  (full: the whole backbone)  or dora, ia3, adapter, prefix, prompt, bitfit
  optimizer=adamw  scheduler=constant  tracking=wandb  experiment=<recipe>  seed=0  batch_size=32
  stream.scenario=class_incremental  stream.n_experiences=5  stream.seed=1  trainer.max_epochs=10
  strategy.replay.capacity=200  strategy.ewc.strength=1000  optimizer.lr=0.001  ...
  --cfg job            print the configuration and stop        --config-dir DIR   add pages of your own
  --hydra-help         what else Hydra offers                  -sc install=bash   shell completion (with eval)
  A misspelt or impossible setting is refused before anything starts.

Examples
  clplatform strategy=finetuning
  clplatform strategy=[replay,lwf] stream=split_fashion_mnist stream.data_dir=data
  clplatform -m strategy=finetuning,ewc,replay seed=0,1,2,3,4
"""

COMMANDS = ("resume", "update", "report", "dashboard", "diagnose", "predict", "check", "list")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 only if everything asked for is complete."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            from clplatform import commands

            name = {"list": "list_"}.get(arguments[0], arguments[0])
            return getattr(commands, name)(arguments[1:])
        if arguments[:1] == ["help"] or {"--help", "-h"} & set(arguments):
            print(HELP, end="")
            return 0
        if "--version" in arguments:
            from clplatform import __version__

            print(__version__)
            return 0
        if arguments and arguments[0].isidentifier():
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `clplatform --help`"
            raise ClplatformError(f"{arguments[0]}: neither a command nor a setting=value; {hint}")
        from clplatform.compose import compose_and_run

        return compose_and_run(arguments)
    except ClplatformError as error:
        print(f"clplatform: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # of argparse and Hydra after a help text, and of a run that a signal has stopped
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("clplatform: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def entry() -> None:
    """Console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
