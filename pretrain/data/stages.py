"""Functions that users have written for webdataset's `.map` and `.select`, put before decoding by their dotted names.

    data:
      stages:
        - {select: my_package.filters.is_large}
        - {map: my_package.captions.clean, decoded: true}

A function gets the sample as a dict: "__key__", "__url__" (the shard's name) and the fields by extension. They are bytes, as
before webdataset's `.decode()`; with `decoded: true` they are what `decode_fields` makes of them, pictures still being bytes.

The functions run in several threads at once. For the order to be exact they must depend on nothing but the sample.
"""

import importlib
import io
import json
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pydantic

from data_tools.errors import UserError, suggest
from data_tools.shards import RawSample
from pretrain.config import ConfigError, ConfigModel
from pretrain.data.decode import BadSample
from pretrain.data.fields import decode_fields


class StageConfig(ConfigModel):
    """One function: `map` gives the sample back, changed or not, or None to reject it; `select` says whether to keep it."""

    map: str | None = None
    select: str | None = None
    decoded: bool = False

    @pydantic.model_validator(mode="after")
    def check_one(self) -> "StageConfig":
        if (self.map is None) == (self.select is None):
            raise ValueError("give either map or select, with the function as package.module.function")
        return self

    @property
    def name(self) -> str:
        return self.map or self.select or ""


class Rejected(BadSample):
    """A sample that a stage does not want; another takes its place."""


def load_stages(stages: Sequence[StageConfig]) -> Callable[[RawSample], RawSample]:
    """A function that takes a sample through all stages, in order. It raises Rejected.

    Raises ConfigError for a name that cannot be imported.
    """
    loaded = [(stage, load_function(stage.name)) for stage in stages]

    def apply(raw: RawSample) -> RawSample:
        for stage, function in loaded:
            raw = _apply(stage, function, raw)
        return raw

    return apply


def load_function(name: str) -> Callable[[dict[str, Any]], Any]:
    """The function of a dotted name. Raises ConfigError, with the nearest name that there is."""
    where = f"data.stages: {name}"
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ConfigError(f"{where}: write package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{where}: importing {module_name} failed: {error}") from None
        parent, _, child = error.name.rpartition(".")
        places = getattr(importlib.import_module(parent), "__path__", []) if parent else None
        hint = suggest(child, [module.name for module in pkgutil.iter_modules(places)])
        raise ConfigError(f"{where}: there is no module {error.name}.{hint}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{where}: {module_name} has no such function.{suggest(function_name, functions)}")
    return function


def _apply(stage: StageConfig, function: Callable[[dict[str, Any]], Any], raw: RawSample) -> RawSample:
    fields = decode_fields(raw.fields) if stage.decoded else raw.fields
    result = function({"__key__": raw.key, "__url__": raw.shard, **fields})
    if stage.select is not None:
        if not result:
            raise Rejected(f"{stage.name} did not select it")
        return raw
    if result is None:
        raise Rejected(f"{stage.name} rejected it")
    if not isinstance(result, dict):
        raise UserError(
            f"data.stages: {stage.name} returned {type(result).__name__}; a map returns the sample, or None"
        )
    fields = {name: _encode(stage, name, value) for name, value in result.items() if not name.startswith("__")}
    return RawSample(result.get("__key__", raw.key), raw.shard, fields, raw.origin)


def _encode(stage: StageConfig, name: str, value: Any) -> bytes:
    """A field back as the bytes that `decode_fields` reads."""
    *_, kind = name.split(".")
    if isinstance(value, bytes):
        return value
    if kind in ("json", "jsn"):
        return json.dumps(value).encode()
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int):
        return str(int(value)).encode()
    if isinstance(value, np.ndarray) and kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    raise UserError(
        f"data.stages: {stage.name} gave the field '{name}' as {type(value).__name__}. Fields are given back as bytes, text, "
        "whole numbers, JSON values (.json) or arrays (.npy)"
    )
