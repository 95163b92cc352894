"""The configuration: defaults, then the YAML file, then the command line. Frozen once built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import yaml
from msgspec import Meta

from .errors import ConfigError

HOME: Final = Path("~/.opta-lmx")
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a runner needs to know about running a model."""

    parallel: Annotated[int, Meta(ge=1, le=256)] = 16
    """Sequences decoded together per model; further ones wait."""
    context_length: Annotated[int, Meta(ge=16)] | None = None
    """Tokens of prompt and answer. None: the model's own (GGUF, which reserves it all at load:
    at most 32768)."""
    prefill_slice_seconds: Annotated[float, Meta(gt=0, le=60)] = 0.25
    """How long one slice of a prompt may hold up running streams."""
    mlx_cache_bytes: Annotated[int, Meta(ge=0)] = 2 * 1024**3
    """Freed buffers MLX may keep for reuse; its own default is nearly all memory."""
    wired_bytes: Annotated[int, Meta(ge=0)] = 0
    """Memory MLX may wire. Leave it 0: wiring is the best-supported trigger of macOS kernel panics
    (https://github.com/ml-explore/mlx/issues/3186)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Used where a request says nothing. LM Studio's values, except its repetition penalty."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Meta(ge=0)] = 40
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 1234
    models_dir: str = str(HOME / "models")
    log_level: LogLevel = "info"
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024**2
    """A larger request body is refused with 413."""
    queue_size: Annotated[int, Meta(ge=1)] = 128
    """Requests running or waiting; one more is refused with 429."""
    load_timeout_seconds: Annotated[float, Meta(gt=0)] = 900.0
    step_timeout_seconds: Annotated[float, Meta(gt=0)] = 120.0
    """A model with running requests that takes no step for so long is restarted."""
    shutdown_grace_seconds: Annotated[float, Meta(ge=0)] = 20.0
    """How long running requests may go on after SIGTERM."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    engine: EngineSettings = field(default_factory=EngineSettings)


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration in `path` (None: the default file, if any), changed by `overrides`.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key or wrong value; names the key.
    """
    default = HOME.expanduser() / "config.yaml"
    chosen = path or (default if default.exists() else None)
    values: Any = {}
    if chosen is not None:
        try:
            values = yaml.safe_load(chosen.read_text(encoding="utf-8"))
        # PyYAML lets a ValueError escape for an impossible date, a RecursionError for a deep nest.
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {chosen}: {error}") from error
        values = {} if values is None else values
    where = str(chosen) if chosen else "command line"
    if isinstance(values, dict):
        values |= overrides or {}
    _refuse_unknown_keys(values, Config, where)
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _refuse_unknown_keys(values: object, cls: type, where: str, prefix: str = "") -> None:
    """A misspelt key must not be ignored; msgspec forbids unknown keys for its own structs only."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of settings{prefix and ' in ' + prefix}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown setting {prefix}{key}")
        nested = fields[key].default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            _refuse_unknown_keys(value, nested, where, f"{prefix}{key}.")
