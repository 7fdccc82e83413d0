"""What every section of the configuration has in common: a frozen part of the tree that refuses unknown keys."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_forms(cls, data: Any) -> Any:
        """Read what people write: `none` for nothing (of a list too), one path for a list of one, an empty section."""
        if not isinstance(data, dict):
            return data
        plain = {}
        for key, value in data.items():
            field = cls.model_fields.get(key)
            annotation = field.annotation if field else None
            if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
                continue
            if isinstance(value, str) and NoneType in get_args(annotation) and value.lower() in ("none", "null"):
                plain[key] = None
            elif get_origin(annotation) is list and value in ("none", "null", ["none"], ["null"]):
                plain[key] = []
            elif isinstance(value, str) and get_origin(annotation) is list:
                plain[key] = [value]
            else:
                plain[key] = value
        return plain


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `override` laid over it, section by section; an empty section changes nothing."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        elif value is not None or not isinstance(merged.get(key), dict):
            merged[key] = value
    return merged
