"""Hydra's errors in one line that says what is wrong and what to do. (It knows them by their text: no import of Hydra.)"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clplatform.config import NONE_CHOSEN, conf_dir
from clplatform.signature import suggest
from clplatform.types import ClplatformError

# Hydra's launchers and sweepers, and what of ours installs them.
EXTRAS = {
    "joblib": "parallel", "optuna": "optuna", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray",
}  # fmt: skip


def explain(error: Exception, overrides: Sequence[str], folders: Sequence[Path]) -> ClplatformError:
    """What to tell the user.

    Args:
        error: from Hydra or OmegaConf.
        overrides: the settings typed.
        folders: where pages are: `conf/` and the user's own.
    """
    text = f"{error}\n{error.__cause__ or ''}"
    if override := getattr(error, "override", None):
        return ClplatformError(f"{override}: not of the form setting=value (quote it if the shell may change it)")
    for explanation in (
        _missing_extra,
        _several_values,
        _missing_page,
        _no_page,
        _added_twice,
        _unknown_key,
        _interpolation,
    ):
        told = explanation(text, overrides, folders)
        if told is not None:
            return ClplatformError(told)
    lines = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not re.search(r"Config search path:|provider=", line)
    ]
    return ClplatformError("; ".join(dict.fromkeys(lines[:2])))


def pages(group: str, folders: Iterable[Path]) -> set[str]:
    """Names of a group's pages."""
    return {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}


def _several_values(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    found = re.search(r"Ambiguous value for argument '([^']+)'|Sweep parameters '([^']+)' requires --multirun", text)
    if found is None:
        return None
    argument = found[1] or found[2]
    setting, _, values = argument.partition("=")
    together = f"; to use them together write strategy=[{values}]"
    plain = setting == "strategy" and re.fullmatch(r"[\w,]+", values)
    return f"{argument}: several values are a sweep, which needs -m{together if plain else ''}"


def _missing_extra(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    """A sweep's engine is a package of its own."""
    found = re.search(r"'hydra/(launcher|sweeper)/(\w+)'|hydra/(launcher|sweeper)='?(\w+)|'(optuna)\.samplers", text)
    engine = next((group for group in found.groups() if group in EXTRAS), None) if found else None
    if engine is None:
        return None
    chosen = next((o for o in overrides if o.startswith("sweep=")), f"hydra: {engine}")
    extra = EXTRAS[engine]
    return f"{chosen}: {engine} is not installed; it comes with clplatform[{extra}] (pip install 'clplatform[{extra}]')"


def _missing_page(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    found = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if found is None:
        return None
    group, _, name = found[1].partition("/")
    if not (conf_dir() / group).is_dir():
        return None
    hint = suggest(name, pages(group, folders)) or "; see `clplatform list`"
    return f"{group}={name}: there is no such {group}{hint}"


def _no_page(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    """`strategy=null`, `backbone=3`, `stream={a:b}`: a group is chosen by the name of a page."""
    if "Config group override must be" not in text:
        return None
    for override in overrides:
        group, _, value = override.partition("=")
        named = re.match(r"[A-Za-z_\[]", value) and value.lower() not in ("null", "true", "false", "nan", "inf")
        if group and pages(group, folders) and not named:
            hint = NONE_CHOSEN.partition("; ")[2] if group == "strategy" else f"see `clplatform list` for {group}"
            return f"{override}: choose a page of {group} by its name; {hint}"
    return None


def _added_twice(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    """`+experiment=a`, `++strategy=replay`, `+trainer.accelerator=cpu`: what is there is changed without a plus."""
    found = re.search(
        r"Multiple values for (\w+)|^(\w+) appears more than once|force-add of config groups is not supported: '([^']+)'|"
        r"An item is already at '([^']+)'",
        text,
    )
    if found is None:
        return None
    setting = next(group for group in found.groups() if group is not None).lstrip("+").partition("=")[0]
    added = next((o for o in overrides if re.match(rf"\++{re.escape(setting)}=", o)), f"+{setting}")
    several = "; several strategies are strategy=[a,b]" if setting == "strategy" else ""
    return f"{added}: {setting} is there already; write it without +{several}"


def _interpolation(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    found = re.search(r"^(.*[Ii]nterpolation.*)$", text, re.MULTILINE)
    if found is None:
        return None
    name = re.search(r"key '([^']+)'|type (\w+)", found[1])
    full = re.search(r"full_key: (\S+)", text)
    place = next(
        (o for o in overrides if name and f"${{{name[1] or name[2]}" in o), full[1] if full else "configuration"
    )
    return f"{place}: {found[1].strip()}"


def _unknown_key(text: str, overrides: Sequence[str], folders: Sequence[Path]) -> str | None:
    key = re.search(r"Key '([^']+)' is not in struct", text) or re.search(r"Could not override '([^']+)'", text)
    if key is None:
        return None
    full = (re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text) or key)[1]
    typed = next((a for a in overrides if a.lstrip("+~").startswith(full)), full)
    parts = full.split(".")
    strategies = pages("strategy", folders)
    if parts[0] == "strategy" and len(parts) > 1 and parts[1] in strategies and key[1] == parts[1]:
        return (
            f"{typed}: the strategy {parts[1]} is not chosen; add strategy={parts[1]}, or "
            f"strategy=[replay,{parts[1]}] for several"
        )
    known = strategies if parts[0] == "strategy" and len(parts) == 2 else _siblings(parts, overrides, folders)
    more = {"trainer": "Lightning's Trainer", "optimizer": "the optimizer"}.get(parts[0])
    if more and typed.startswith(f"{full}=") and not difflib.get_close_matches(parts[-1], known, cutoff=0.8):
        return f"{typed}: the page has no such setting; if {more} has it, add it with +{typed}"
    return f"{typed}: there is no such setting{suggest(parts[-1], known)}"


def _siblings(parts: list[str], overrides: Sequence[str], folders: Sequence[Path]) -> set[str]:
    """Keys that stand where the unknown one was put, on the page that is chosen."""
    root: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "run.yaml"))
    if len(parts) == 1:
        groups = {p.name for p in conf_dir().iterdir() if p.is_dir()}
        return groups | set(root) - {"defaults", "hydra"}
    if parts[0] == "strategy":
        name: Any = parts[1]
    else:
        chosen = {k: v for entry in root["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
        chosen |= dict(a.split("=", 1) for a in overrides if re.fullmatch(r"\w+=\w+", a))
        name = chosen.get(parts[0])
    page = next((p for f in folders if (p := f / parts[0] / f"{name}.yaml").is_file()), None)
    values: Any = OmegaConf.to_container(OmegaConf.load(page)) if page else root.get(parts[0], {})
    for part in parts[1:-1]:
        values = values.get(part) or {}
    return {str(k) for k in values} - {"_target_", "_partial_", "name"}
