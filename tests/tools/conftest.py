"""The finished run of the training tests, for tools that need one."""

from tests.training.conftest import _datasets_cache, digits_folder, finished, make_config, write_config

__all__ = ["_datasets_cache", "digits_folder", "finished", "make_config", "write_config"]
