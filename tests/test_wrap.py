"""`jlora.wrap` on the torture list, products, views and calls: factored, and equal to the merged function in value and gradient."""

import pytest
import torture

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("name", "kind", "dtype"), torture.rows(loops=False))
def test_torture(name, kind, dtype):
    torture.check(name, kind, dtype)
