"""The configuration: defaults, then the YAML file, then the command line. Frozen once built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import yaml
from msgspec import Meta

from .errors import ConfigError

HOME: Final = Path("~/.opta-lmx")
DEFAULT_FILE: Final = HOME / "config.yaml"
"""Read if it is there and no other is named."""
LOCAL: Final = {"localhost", "127.0.0.1", "::1"}
"""Names of this machine that no other can reach it by."""
KV_TOKENS: Final = 32768
"""The longest context whose KV cache is reserved at load where the configuration names none. MLX
gets more when a request needs it and memory is free; llama.cpp allocates it all at load."""

LogLevel = Literal["debug", "info", "warning", "error"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file; a misspelt key in it is an error."""


class EngineSettings(Section, frozen=True):
    """What a runner needs to know about running a model."""

    parallel: Annotated[int, Meta(ge=1, le=256)] = 16
    """Sequences decoded together per model; further ones wait."""
    context_length: Annotated[int, Meta(ge=16)] | None = None
    """Tokens of prompt and answer. None: the model's own (GGUF, which reserves it all at load:
    at most 32768)."""
    chat_template: str | None = None
    """A Jinja file to use instead of the model's own template."""
    prefill_slice_seconds: Annotated[float, Meta(gt=0, le=60)] = 0.25
    """How long one slice of a prompt may hold up running streams."""
    prefix_cache_bytes: Annotated[int, Meta(ge=0)] | None = None
    """What the KV caches of past prompts may take. None: what running sequences leave. 0: none are
    kept."""
    prefix_disk_bytes: Annotated[int, Meta(ge=0)] = 0
    """What of these may be written to disk when the model is unloaded, to be found again by its
    next load. 0: no prompt ever reaches the disk."""
    prefix_disk_dir: str = str(HOME / "prefixes")
    draft_tokens: Annotated[int, Meta(ge=0, le=32)] = 8
    """At most so many tokens are guessed ahead, for a stream that runs alone and as long as it
    makes that faster: by `draft_model`, or from what the text repeats. 0: none."""
    draft_model: str | None = None
    """Id of a small model with the same vocabulary that guesses for this one."""
    mlx_cache_bytes: Annotated[int, Meta(ge=0)] = 2 * 1024**3
    """Freed buffers MLX may keep for reuse; its own default is nearly all memory."""
    wired_bytes: Annotated[int, Meta(ge=0)] = 0
    """Memory MLX may wire. Leave it 0: wiring is the best-supported trigger of macOS kernel panics
    (https://github.com/ml-explore/mlx/issues/3186)."""


class SamplingDefaults(Section, frozen=True):
    """Used where a request says nothing. LM Studio's values, except its repetition penalty."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Meta(ge=0)] = 40
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.05
    separate_reasoning: bool = True
    """Reasoning goes out beside the content; False leaves it inside."""


class MemoryLimits(Section, frozen=True):
    limit_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Of all unified memory, that everything on the machine together may use before a load is
    refused."""
    limit_bytes: Annotated[int, Meta(ge=1)] | None = None
    """What the models together may use. None: no limit besides the fraction and Metal's."""
    wait_seconds: Annotated[float, Meta(ge=0)] = 300.0
    """How long a load waits for models in use to become idle and give way."""


class HubSettings(Section, frozen=True):
    """Downloads. The endpoint and the token are Hugging Face's own: HF_ENDPOINT, HF_TOKEN."""

    offline: bool = False
    """Ask nobody outside this machine."""
    parallel_files: Annotated[int, Meta(ge=1, le=32)] = 4
    allow_unverified: bool = False
    """Take files for which the hub tells no hash."""
    reserve_bytes: Annotated[int, Meta(ge=0)] = 5 * 1024**3
    """Disk space a download leaves free."""


class ModelSettings(Section, frozen=True):
    """What differs for one model."""

    engine: dict[str, Any] = {}
    """Settings of `engine` that replace the common ones."""
    sampling: dict[str, Any] = {}
    """Settings of `sampling` that replace the common ones."""
    ttl_seconds: Annotated[float, Meta(gt=0)] | None = None
    """Replaces the common `ttl_seconds`."""
    pinned: bool = False
    """Never unloaded but by hand."""
    backend: Literal["mlx", "gguf"] | None = None
    """Use these weights and no others. None: MLX, and GGUF where that does not load."""


class Config(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 1234
    models_dir: str = str(HOME / "models")
    """Where downloads go."""
    model_roots: tuple[str, ...] = ("lmstudio", "huggingface")
    """Where else models are looked for, and nothing is ever changed: LM Studio's folder, Hugging
    Face's cache, or a path to a folder of publisher/repo folders."""
    state_file: str = str(HOME / "state.json")
    """What is remembered over a restart: loaded models, what each has really needed."""
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: str | None = None
    """Where the log goes; to stderr then only warnings and worse. None: stderr alone."""
    log_file_bytes: Annotated[int, Meta(ge=4096)] = 10 * 1024**2
    """A larger file becomes `log_file`.1, of which five are kept."""
    admin_key: Annotated[str, Meta(min_length=1)] | None = None
    """What /admin wants in X-Admin-Key. None: this machine and private networks only."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024**2
    """A larger request body is refused with 413."""
    queue_size: Annotated[int, Meta(ge=1)] = 128
    """Requests running or waiting; one more is refused with 429."""
    load_timeout_seconds: Annotated[float, Meta(gt=0)] = 900.0
    step_timeout_seconds: Annotated[float, Meta(gt=0)] = 120.0
    """A model with running requests that takes no step for so long is restarted."""
    shutdown_grace_seconds: Annotated[float, Meta(ge=0)] = 20.0
    """How long running requests may go on after SIGTERM."""
    ttl_seconds: Annotated[float, Meta(gt=0)] | None = 3600.0
    """A model that a request has loaded is unloaded after so long without work. None: never."""
    preload: tuple[str, ...] = ()
    """Models to load at start."""
    restore: bool = False
    """Load at start what was loaded when the server stopped."""
    aliases: dict[str, str] = {}
    """Further names of models."""
    models: dict[str, ModelSettings] = {}
    """By model id."""
    sampling: SamplingDefaults = SamplingDefaults()
    engine: EngineSettings = EngineSettings()
    memory: MemoryLimits = MemoryLimits()
    hub: HubSettings = HubSettings()

    @property
    def url(self) -> str:
        """Where a server with this configuration answers on its own machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def model(self, id: str) -> ModelSettings:
        return self.models.get(id, ModelSettings())

    def engine_for(self, id: str) -> EngineSettings:
        return msgspec.convert(
            msgspec.structs.asdict(self.engine) | self.model(id).engine, EngineSettings
        )

    def sampling_for(self, id: str) -> SamplingDefaults:
        return msgspec.convert(
            msgspec.structs.asdict(self.sampling) | self.model(id).sampling, SamplingDefaults
        )


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration in `path` (None: the default file, if any), changed by `overrides`.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key or wrong value; names the key.
    """
    default = DEFAULT_FILE.expanduser()
    chosen = path or (default if default.exists() else None)
    values: Any = {}
    if chosen is not None:
        try:
            values = yaml.safe_load(chosen.read_text(encoding="utf-8"))
        # PyYAML lets out what its own code fails with: a RecursionError for a deep nest, for `!!int
        # ''`, `!!bool x` and `!!timestamp x` an IndexError, a KeyError and an AttributeError.
        except (
            OSError,
            ValueError,
            LookupError,
            AttributeError,
            RecursionError,
            yaml.YAMLError,
        ) as error:
            raise ConfigError(f"cannot read the configuration {chosen}: {error}") from error
        values = {} if values is None else values
    if isinstance(values, dict):
        values |= overrides or {}
    where = str(chosen) if chosen else "command line"
    try:
        config = msgspec.convert(values, Config)
        for id in config.models:
            where = f"{chosen}: in models.{id}"
            config.engine_for(id), config.sampling_for(id)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config
