"""Frozen dataclasses as pytree nodes whose annotations are of the values that people make.

JAX puts what it likes in the place of leaves when it rebuilds a tree: shapes, booleans, axis numbers, `object()`, None. So
rebuilding does not construct: `__init__`, and with it any check of the fields, is for those who make a value.
"""

import operator
from typing import TypeVar

import jax
from jax.tree_util import GetAttrKey

_Class = TypeVar("_Class", bound=type)
_Value = TypeVar("_Value")


def register_node(cls: _Class, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> _Class:
    """`jax.tree_util.register_dataclass`, but that `cls.__init__` is not called to rebuild a value from its children."""
    keys = [GetAttrKey(name) for name in data_fields]
    data, meta = _getter(data_fields), _getter(meta_fields)

    def flatten(value):
        return data(value), meta(value)

    def flatten_with_keys(value):
        return tuple(zip(keys, data(value), strict=True)), meta(value)

    def unflatten(fields, children):
        value = object.__new__(cls)
        vars(value).update(zip(data_fields, children, strict=True), **dict(zip(meta_fields, fields, strict=True)))
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def rebuilt(value: _Value, /, **children: object) -> _Value:
    """The same value with these children in place of its own, whatever they are, as in a tree that JAX rebuilds."""
    copy = object.__new__(type(value))
    vars(copy).update(vars(value), **children)
    return copy


def _getter(names: tuple[str, ...]):
    """value -> the tuple of these attributes."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)
