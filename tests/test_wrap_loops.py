"""`jlora.wrap` on the torture list, loops: factored, and equal to the merged function in value and gradient."""

import pytest
import torture

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("name", "kind", "dtype"), torture.rows(loops=True))
def test_torture(name, kind, dtype):
    torture.check(name, kind, dtype)
