"""The configuration: defaults, file, overrides, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from lmx.config import Config, EngineSettings, ModelSettings, SamplingDefaults, load_config
from lmx.errors import ConfigError
from lmx.reload import NEED_RESTART

EXAMPLE = Path(__file__).parent.parent / "config.example.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, so that nobody's own configuration plays a part."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "lmx.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    """Without a file and overrides the defaults hold: this machine only, LM Studio's port."""
    config = load_config(None)
    assert config == Config()
    assert (config.host, config.port) == ("127.0.0.1", 1234)


def test_default_file(home: Path) -> None:
    """Without a path, ~/.opta-lmx/config.yaml is read if it is there."""
    (home / ".opta-lmx").mkdir()
    (home / ".opta-lmx" / "config.yaml").write_text("port: 4321\n")
    assert load_config(None).port == 4321


def test_file(tmp_path: Path) -> None:
    """What the file says replaces the default; what it leaves out stays."""
    path = written(tmp_path, "port: 1\nsampling: {top_k: 7}\nengine:\n  context_length: 4096\n")
    assert load_config(path) == Config(
        port=1, sampling=SamplingDefaults(top_k=7), engine=EngineSettings(context_length=4096)
    )


def test_settings_of_one_model(tmp_path: Path) -> None:
    """They replace the common ones for that model only."""
    one = "{engine: {parallel: 2}, sampling: {temperature: 0.5}}"
    config = load_config(written(tmp_path, f"models: {{a: {one}}}\nengine: {{parallel: 9}}\n"))
    assert (config.engine_for("a").parallel, config.engine_for("b").parallel) == (2, 9)
    assert config.sampling_for("a") == SamplingDefaults(temperature=0.5)
    assert config.sampling_for("b") == SamplingDefaults()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    """An empty file means the defaults."""
    assert load_config(written(tmp_path, text)) == Config()


def test_overrides_win(tmp_path: Path) -> None:
    """The command line wins over the file, and both over the defaults."""
    path = written(tmp_path, "port: 1\nhost: 0.0.0.0\n")
    config = load_config(path, {"port": 2})
    assert (config.host, config.port) == ("0.0.0.0", 2)


def test_overrides_without_a_file() -> None:
    """The command line works without a file, and its errors say where they come from."""
    assert load_config(None, {"port": 2}).port == 2
    with pytest.raises(ConfigError, match=r"command line: .*port"):
        load_config(None, {"port": -1})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("prot: 1\n", "unknown field `prot`", id="unknown"),
        pytest.param(
            "engine: {paralel: 1}\n", r"unknown field `paralel` - at `\$\.engine`", id="nested"
        ),
        pytest.param("1: 2\n", "at `key`", id="not-a-name"),
        pytest.param("port: '1'\n", r"\$\.port", id="text-for-number"),
        pytest.param("port: true\n", r"\$\.port", id="boolean-for-number"),
        pytest.param("port: 65536\n", r"\$\.port", id="too-large"),
        pytest.param("host: 1\n", r"\$\.host", id="number-for-text"),
        pytest.param("log_level: loud\n", r"\$\.log_level", id="not-a-choice"),
        pytest.param("engine: {parallel: 0}\n", r"\$\.engine\.parallel", id="nested-too-small"),
        pytest.param("sampling: {temperature: .nan}\n", r"\$\.sampling\.temp", id="nan"),
        pytest.param("engine: 4\n", r"\$\.engine", id="nested-no-mapping"),
        pytest.param(
            "models: {a: {engine: {parallel: 0}}}\n", r"in models\.a: .*parallel", id="model"
        ),
        pytest.param(
            "models: {a: {sampling: {temp: 0}}}\n", r"in models\.a: .*`temp`", id="model-2"
        ),
        pytest.param("models: {a: {pin: true}}\n", "`pin`", id="model-3"),
        pytest.param("- port\n", "Expected `object`", id="list"),
        pytest.param("port\n", "Expected `object`", id="text"),
        pytest.param("port: [\n", "cannot read", id="bad-yaml"),
        pytest.param("port: !!python/name:os.system\n", "cannot read", id="python-tag"),
        pytest.param("port: !!int ''\n", "cannot read", id="tag-of-nothing"),
        pytest.param("port: !!bool x\n", "cannot read", id="tag-of-another"),
        pytest.param("port: !!timestamp x\n", "cannot read", id="tag-without-a-match"),
    ],
)
def test_refused(tmp_path: Path, text: str, named: str) -> None:
    """A setting that cannot be used ends with an error that names the file and the setting."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "not-utf-8"])
def test_unreadable(tmp_path: Path, kind: str) -> None:
    """A file that was asked for but cannot be read is an error that names it."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "not-utf-8":
        path.write_bytes(b"host: \xff\n")
    with pytest.raises(ConfigError, match=f"cannot read the configuration {path}"):
        load_config(path)


def test_frozen() -> None:
    """Nobody changes the configuration once it is built."""
    with pytest.raises(AttributeError):
        load_config(None).port = 1  # type: ignore[misc]


def test_example_is_the_defaults() -> None:
    """config.example.yaml shows every setting, and each with its default."""
    values = msgspec.json.decode(msgspec.json.encode(Config()))
    assert yaml.safe_load(EXAMPLE.read_text()) == values
    assert load_config(EXAMPLE) == Config()


def test_example_of_one_model(tmp_path: Path) -> None:
    """The comment above `models` can be uncommented, and shows every setting of a model."""
    before, _, _ = EXAMPLE.read_text().partition("\nmodels: {}")
    _, comment = before.split("# What differs for one model")
    _, *lines = comment.splitlines()
    config = load_config(written(tmp_path, "\n".join(["models:", *(line[1:] for line in lines)])))
    [shown] = config.models.values()
    for name in ModelSettings.__struct_fields__:
        assert getattr(shown, name) != getattr(ModelSettings(), name), name


def test_example_says_what_needs_a_restart() -> None:
    """In config.example.yaml these settings say so, and no others."""
    found, comment = set(), ""
    for line in EXAMPLE.read_text().splitlines():
        if line.lstrip().startswith("#"):
            comment += line
        else:
            found |= {line.partition(":")[0]} if "Needs a restart." in comment else set()
            comment = ""
    assert found == NEED_RESTART


def test_example_explains_every_setting() -> None:
    """In config.example.yaml each setting stands under a comment of its own."""
    lines = EXAMPLE.read_text().splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if line.strip() and not line.lstrip().startswith("#") and not above.lstrip().startswith("#")
    ]
    assert bare == []
