"""`jlora.wrap` on the torture list, products, views and calls: factored, and equal to the merged function in value and gradient."""

import pytest
import torture

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "kind", "dtype"), list(torture.rows(loops=False)))
def test_torture(name, kind, dtype):
    torture.check(name, kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "dtype"), list(torture.rows(loops=False)))
def test_eagerly_and_again(name, kind, dtype):
    torture.check_eagerly(name, kind, dtype)
