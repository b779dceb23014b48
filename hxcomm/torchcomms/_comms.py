"""The package's names under the module that programs for torchcomms import them from, too."""

from hxcomm.torchcomms import *  # noqa: F403
from hxcomm.torchcomms.backend_wrapper import _BackendWrapper  # noqa: F401
