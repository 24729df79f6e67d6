"""The model and adapters of the contract's tests."""

from tests.serving.conftest import _one_thread
from tests.serving.contract.conftest import adapter_dirs, loaded, model_dir

__all__ = ["_one_thread", "adapter_dirs", "loaded", "model_dir"]
