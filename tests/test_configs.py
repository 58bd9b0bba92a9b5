"""Old names of tests/contract/configs.py; the file goes away when no test imports it."""

from contract.configs import compose_config as composed
from contract.configs import to_dict as plain

__all__ = ["composed", "plain"]
