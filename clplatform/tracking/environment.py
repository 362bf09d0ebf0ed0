"""What a run ran on: `environment.json`. No dump of environment variables, no user name, no home path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "transformers", "tokenizers", "peft", "datasets",
    "avalanche-lib", "hydra-core", "omegaconf", "wandb", "numpy", "scipy", "scikit-learn", "pandas", "safetensors",
)  # fmt: skip
# Names of secrets: `api_key`, `hf-token`, `db.password`; not `max_tokens`, `tokenizer` or `keyboard`.
SECRET_NAME = r"(?:[\w.+~-]*[._+~-])?(?:\w*api_?key|key|token|password|passwd|pwd|secret|credentials?)"
SECRET = re.compile(SECRET_NAME, re.IGNORECASE)
# Inside a word: `hub={token:abc,name:x}`, `url?token=abc&x=1`
NESTED_SECRET = re.compile(rf"(?<![\w.-])({SECRET_NAME})(['\"]?\s*[:=]\s*)[^,&}}\]\s]+", re.IGNORECASE)
# A key as the services write them: nobody's setting looks like this.
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|[0-9a-f]{40}|wandb_v1_\w+|gh[pousr]_\w{20,}|sk-[\w-]{20,})\b")
REDACTED = "<redacted>"


def environment() -> dict[str, Any]:
    """Versions, devices, state of the code and command line, as plain values for JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "count": cpu_count()},
        **torch_state(),
        "packages": packages(),
        "code": code_state(),
        "command": command_line(sys.argv),
    }


def code_state() -> dict[str, Any]:
    """`version`, and of a checkout `git_commit` and `dirty` (None both when installed from a wheel)."""
    from clplatform import __version__

    checkout = Path(__file__).resolve().parents[2]
    commit = _git(checkout, "rev-parse", "HEAD") if _is_ours(checkout) else None
    status = _git(checkout, "status", "--porcelain") if commit else None
    return {"version": __version__, "git_commit": commit, "dirty": bool(status) if status is not None else None}


def _is_ours(checkout: Path) -> bool:
    """A checkout of clplatform, not of something else that the package was copied or installed into?"""
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkout / ".git").exists() and project.get("project", {}).get("name") == "clplatform"


def _git(folder: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def packages() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def torch_state() -> dict[str, Any]:
    """Threads and GPUs as PyTorch sees them; nothing where PyTorch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "gpus": gpus, "cuda": torch.version.cuda if gpus else None}


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command_line(argv: list[str]) -> list[str]:
    """The command line without secrets and without the path of the home folder."""
    words = [Path(argv[0]).name, *argv[1:]] if argv else []
    redacted, hide_next = [], False
    for word in words:
        redacted.append(REDACTED if hide_next else _redact(word))
        # `--api-key VALUE`: the secret is the next word
        hide_next = not hide_next and word.startswith("-") and SECRET.fullmatch(word.lstrip("-")) is not None
    home = str(Path.home())
    return [word.replace(home, "~") if len(home) > 1 else word for word in redacted]


def _redact(word: str) -> str:
    name, equals, _ = word.partition("=")
    if equals and SECRET.fullmatch(name.lstrip("-+~")):
        return f"{name}={REDACTED}"
    word = re.sub(r"(://[^/\s:@]+):[^/\s@]+@", rf"\1:{REDACTED}@", word)  # https://user:password@host
    return SECRET_VALUE.sub(REDACTED, NESTED_SECRET.sub(rf"\1\2{REDACTED}", word))
