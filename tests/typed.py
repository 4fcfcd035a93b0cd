"""Annotations that are checked: imported before `jlora`, this makes every call of the package check its arguments and its result.

Shapes by jaxtyping, types by beartype. As everywhere in Python's typing (PEP 484), an int will do where a float is asked for.
"""

import doctest
import inspect

import beartype
import jaxtyping

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("jlora", f"{__name__}.check")

_is_of_module = doctest.DocTestFinder._from_module


def _from_module(finder, module, thing):
    """A checked function is of the module of the function in it; doctest would think it jaxtyping's, and find no examples."""
    return _is_of_module(finder, module, inspect.unwrap(thing) if inspect.isroutine(thing) else thing)


doctest.DocTestFinder._from_module = _from_module
