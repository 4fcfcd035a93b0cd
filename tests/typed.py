"""Annotations that are checked: imported before `jlora` (by conftest.py), this makes every call of the package check its
arguments and its result.

Shapes by jaxtyping, types by beartype. As everywhere in Python's typing (PEP 484), an int will do where a float is asked for.
"""

import doctest
import inspect

import beartype
import jaxtyping
import pytest

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("jlora", f"{__name__}.check")

_is_of_module = doctest.DocTestFinder._from_module


def _from_module(finder, module, thing):
    """A checked function is of the module of the function in it; doctest would think it jaxtyping's, and find no examples."""
    return _is_of_module(finder, module, inspect.unwrap(thing) if inspect.isroutine(thing) else thing)


doctest.DocTestFinder._from_module = _from_module


_enter, _leave = pytest.RaisesExc.__enter__, pytest.RaisesExc.__exit__


def _unchecked(expected):
    """Where a test expects an error nothing is checked: what annotations forbid is handed over, to see our own refusal."""
    expected.was_unchecked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    return _enter(expected)


def _checked_again(expected, *raised):
    jaxtyping.config.update("jaxtyping_disable", expected.was_unchecked)
    return _leave(expected, *raised)


pytest.RaisesExc.__enter__, pytest.RaisesExc.__exit__ = _unchecked, _checked_again
