"""A table's config: read, inherited, checked key by key, hashed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grapefx.errors import OptionError, nearest
from grapefx.plan import resolve
from tools.common.networks import ACTIVATIONS, INITS, MODEL_KEYS

IMAGES = ("mnist", "fashion-mnist", "cifar10", "cifar100")
TEXT = "tinyshakespeare"
CHOICES: dict[str, tuple[Any, ...]] = {
    "dataset": (*IMAGES, TEXT),
    "normalise": ("half", "standard", "none"),
    "init": INITS,
    "metric": ("last", "best", "best_perplexity"),
    "loss": ("cross_entropy", "bce"),  # bce: sigmoid outputs, a binary cross-entropy for each class
}
OPTIONAL = {"loss": "cross_entropy", "bp_epoch_every": None, "keep_largest": None}
OPTIMIZER = {
    "adam": {"name", "lr", "betas", "eps", "weight_decay"},
    "sgd": {"name", "lr", "momentum", "weight_decay"},
}
SCHEDULE = {
    "constant": {"name"},
    "linear": {"name"},  # to 0, a step at a time; the others change once an epoch
    "exponential": {"name", "gamma"},
    "milestones": {"name", "gamma", "at"},
}
# What decides a cell's result is hashed; a table's words are not.
WORDS = {"title", "source", "differs"}
SETTING = {
    "dataset", "train", "test", "normalise", "model", "init", "epochs", "batch_size", "optimizer",
    "schedule", "alignment_batches", "metric", "loss", "bp_epoch_every",
    "keep_largest",
}  # fmt: skip
# keep_largest, k: a step learns from the k-th part of its batch whose error is largest alone.
# bp_epoch_every, T: after each T-th epoch a whole one of calibration steps, on other batches.
ROW_SETTING = {
    "method", "options", "optimizer", "schedule", "init", "model", "loss", "bp_epoch_every",
    "batch_size", "keep_largest",
}  # fmt: skip
ROW_WORDS = {"published", "note"}


class ConfigError(Exception):
    """A config that cannot be run; says which key, and the nearest valid one."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a method with its options."""

    name: str
    method: str
    options: dict[str, Any]
    setting: dict[str, Any]  # the config's setting with the row's own keys in place
    published: tuple[float, float | None] | None
    note: str
    hash: str


@dataclass(frozen=True)
class Config:
    """One column of a paper's table."""

    name: str
    title: str
    source: str
    differs: tuple[str, ...]
    setting: dict[str, Any]
    rows: dict[str, Row]
    hash: str
    sets: tuple[str, ...]


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, mapping by mapping; null removes a key. Options are replaced whole."""
    out = dict(base)
    for key, value in top.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict) and key != "options":
            named = ("kind", "name")  # another kind of model or optimizer starts afresh
            other = any(value.get(k, out[key].get(k)) != out[key].get(k) for k in named)
            out[key] = value if other else merged(out[key], value)
        else:
            out[key] = value
    return out


def _yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no such config: {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping")
    base = raw.pop("base", None)
    return raw if base is None else merged(_yaml(path.parent / base), raw)


def _keys(where: str, have: dict[str, Any], valid: set[str], required: set[str]) -> None:
    for key in have:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}.{nearest(str(key), valid)}")
    for key in sorted(required - set(have)):
        raise ConfigError(f"{where}: {key!r} is missing")


def _named(where: str, have: Any, kinds: dict[str, set[str]], tag: str = "name") -> None:
    if not isinstance(have, dict) or have.get(tag) not in kinds:
        name = have.get(tag) if isinstance(have, dict) else have
        raise ConfigError(f"{where}: {tag} {name!r}.{nearest(str(name), kinds)}")
    valid = kinds[have[tag]]
    _keys(where, have, valid, valid)


def _check_setting(where: str, s: dict[str, Any]) -> None:
    _keys(where, s, SETTING, SETTING - set(OPTIONAL))
    for key, valid in CHOICES.items():
        value = s.get(key, OPTIONAL.get(key))
        if value not in valid:
            raise ConfigError(f"{where}: {key}={value!r}.{nearest(str(value), valid)}")
    for key in ("epochs", "batch_size", "train", "test"):
        if not isinstance(s[key], int) or s[key] < 1:
            raise ConfigError(f"{where}: {key}={s[key]!r} must be a positive integer")
    every = s.get("bp_epoch_every")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ConfigError(f"{where}: bp_epoch_every={every!r} must be a positive integer")
    keep = s.get("keep_largest")
    if keep is not None and (not isinstance(keep, float) or not 0 < keep < 1):
        raise ConfigError(f"{where}: keep_largest={keep!r} must lie between 0 and 1")
    _named(f"{where}.model", s["model"], {k: {"kind", *v} for k, v in MODEL_KEYS.items()}, "kind")
    activation = s["model"].get("activation", "relu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"{where}.model: {activation!r}.{nearest(activation, ACTIVATIONS)}")
    if (s["model"]["kind"] == "transformer") != (s["dataset"] == TEXT):
        raise ConfigError(f"{where}: model {s['model']['kind']} does not go with {s['dataset']}")
    _named(f"{where}.optimizer", s["optimizer"], OPTIMIZER)
    _named(f"{where}.schedule", s["schedule"], SCHEDULE)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _row(where: str, name: str, raw: Any, setting: dict[str, Any]) -> Row:
    where = f"{where}: methods.{name}"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a mapping")
    _keys(where, raw, ROW_SETTING | ROW_WORDS, {"method", "options"})
    own = {k: v for k, v in raw.items() if k in SETTING}
    full = merged(setting, own)
    _check_setting(where, full)
    try:
        options = dict(raw["options"])
        resolve(raw["method"], options, options.pop("preset", "recommended"))
    except OptionError as error:
        raise ConfigError(f"{where}: {error}") from error
    published = raw.get("published")
    if published is not None and (not isinstance(published, list) or len(published) != 2):
        raise ConfigError(f"{where}: published is [mean, sd], sd may be null")
    return Row(
        name,
        raw["method"],
        raw["options"],
        full,
        tuple(published) if published else None,
        raw.get("note", ""),
        _hash({k: raw[k] for k in sorted(ROW_SETTING & set(raw))}),
    )


def load_config(path: str | Path, sets: tuple[str, ...] = ()) -> Config:
    """The config at ``path``; ``sets`` are ``key.key=value`` changes, each part of the name.

    Raises:
        ConfigError: a missing, unknown or impossible key.
    """
    path = Path(path)
    raw, name = _yaml(path), path.stem
    for change in sets:
        keys, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r}: expected key.key=value")
        top: Any = yaml.safe_load(value)
        for key in reversed(keys.split(".")):
            top = {key: top}
        raw = merged(raw, top)
        name += "+" + change.replace("/", "_")
    _keys(path.name, raw, WORDS | SETTING | {"methods"}, {"title", "source", "methods"})
    setting = {k: v for k, v in raw.items() if k in SETTING}
    _check_setting(path.name, setting)
    rows = {n: _row(path.name, n, r, setting) for n, r in raw["methods"].items()}
    try:  # a subset or another network is named by what --set made of it
        title, *differs = (d.format(**setting) for d in (raw["title"], *raw.get("differs", ())))
    except (KeyError, IndexError, ValueError) as e:
        raise ConfigError(f"{path.name}: title, differs: {e!r} is no key of the config") from e
    hashed = _hash(setting)
    return Config(name, title, raw["source"], tuple(differs), setting, rows, hashed, sets)
