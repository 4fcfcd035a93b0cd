"""Annotations that are checked: imported before `jlora`, this makes every call of the package check its arguments and its result.

Shapes by jaxtyping, types by beartype. As everywhere in Python's typing (PEP 484), an int will do where a float is asked for.
"""

import beartype
import jaxtyping

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("jlora", f"{__name__}.check")
