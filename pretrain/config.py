"""Strict, typed configuration: a YAML file plus dotted overrides become a checked model. Never imports torch.

Each module owns its config model beside its code, as a subclass of `ConfigModel`; `pretrain.train.RunConfig` nests them.
Values come from defaults < the YAML file < `key=value` overrides. Nothing unknown passes: a misspelt key is refused with
the nearest valid one and the whole list.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args

import pydantic
import yaml

from data_tools.errors import UserError, suggest


class ConfigModel(pydantic.BaseModel):
    """Base of every config section: no unknown keys, no silent conversions, no changes after loading."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


Count = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
Ratio = Annotated[float, pydantic.Field(gt=0)]


class ConfigError(UserError):
    """A configuration that cannot be used; its text is one line: where, what was found, what is valid."""


Config = TypeVar("Config", bound=ConfigModel)


def union_by_kind(registry: dict[str, type[ConfigModel]]) -> Any:
    """The type of a section that chooses one of `registry` by its `kind:` key."""
    if len(registry) == 1:
        return next(iter(registry.values()))
    return Annotated[Union[tuple(registry.values())], pydantic.Field(discriminator="kind")]  # noqa: UP007


def load_config(path: str | Path, overrides: list[str], model: type[Config]) -> Config:
    """Read the YAML file, apply `key.sub=value` overrides (values are YAML) and check it against `model`.

    Raises ConfigError, in one line, for an unreadable file, an unknown key or a value of the wrong type.
    """
    values = read_yaml(path)
    for override in overrides:
        set_dotted(values, override)
    return check_config(values, model, where=str(path))


def check_config(values: dict[str, Any], model: type[Config], where: str) -> Config:
    """Build `model` from plain values; `where` opens the error message."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: " + explain(error.errors(include_url=False)[0], model)) from None


def render_config(config: ConfigModel) -> str:
    """The resolved configuration, defaults included, as YAML that `load_config` reads back to an equal model."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `3e-4` as a number (PyYAML alone makes it text) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text. A config is a YAML file, as those in configs/.") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a YAML mapping of keys to values; found {type(values).__name__}")
    return values


def set_dotted(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` in place."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override '{override}': write key=value, e.g. train.batch_size=512")
    section = values
    *parents, key = name.split(".")
    for depth, parent in enumerate(parents, start=1):
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if isinstance(section, list):
            whole = ".".join(parents[:depth])
            raise ConfigError(f"override '{override}': '{parent}' is a list; give it whole, {whole}=[...]")
        if not isinstance(section, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a single value and has no keys below it")
    section[key] = parse_yaml(text, f"override '{override}'")


def explain(error: dict[str, Any], model: type[ConfigModel]) -> str:
    """One of pydantic's errors as one line: dotted key, what was found, what is valid."""
    names, section, choices = locate(error["loc"], model)
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        valid = list(section.model_fields)
        return f"{key}: unknown key.{suggest(names[-1], valid)} Valid: {', '.join(valid)}"
    if error["type"] == "missing":
        in_list = any(isinstance(part, int) for part in error["loc"])  # which an override only gives as a whole
        return f"{key}: is missing. It has no default; set it in the file" + ("" if in_list else f" or as {key}=...")
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [kind for choice in choices for kind in get_args(choice.model_fields["kind"].annotation)]
        tag = error["ctx"].get("tag")
        found = "is missing." if tag is None else f"unknown kind '{tag}'.{suggest(tag, kinds)}"
        return f"{key}.kind: {found} Valid: {', '.join(kinds)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: should be a mapping of keys to values; found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    where = f"{key}: " if key else ""  # none: about several sections, which the message names
    return f"{where}{message}" + ("" if error["type"] == "value_error" else f"; found {error['input']!r}")


def locate(
    place: tuple[int | str, ...], model: type[ConfigModel]
) -> tuple[list[str], type[ConfigModel], list[type[ConfigModel]]]:
    """Follow pydantic's error location through `model`: the dotted names, the section that holds the last one, and the
    config models that the last one can be."""
    names, section, models = [], model, [model]
    for part in place:
        if isinstance(part, str) and len(models) > 1:
            # pydantic puts the chosen kind into the path; users do not write it there
            models = [next(m for m in models if part in get_args(m.model_fields["kind"].annotation))]
            section = models[0]
            continue
        names.append(str(part))
        if isinstance(part, str) and models:  # a number is a place in a list of these models
            section = models[0]
            models = config_models(section.model_fields[part].annotation) if part in section.model_fields else []
    return names, section, models


def config_models(annotation: Any) -> list[type[ConfigModel]]:
    """The config models in a type, looking through Optional, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in config_models(argument)]
