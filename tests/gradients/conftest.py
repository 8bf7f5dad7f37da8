import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Argument types are not checked, as for users: the library's own errors are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
