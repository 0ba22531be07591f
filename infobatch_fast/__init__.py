"""Training on fewer samples by dynamic data pruning: InfoBatch, resident on the GPU.

The exports resolve on first use (PEP 562), so that `InfoBatch` needs torch and numpy alone:
importing it loads neither DALI nor torchvision nor the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "InfoBatch": "infobatch",
    "spend": "budget",
    "Plan": "plan",
    "Batch": "plan",
    "ProgressLR": "adapters.progress",
    "DaliLoader": "data.dali",
    "TorchLoader": "data.loader",
}
__all__ = [
    "Batch",
    "DaliLoader",
    "InfoBatch",
    "Plan",
    "ProgressLR",
    "TorchLoader",
    "__version__",
    "spend",
]

if TYPE_CHECKING:
    from infobatch_fast.adapters.progress import ProgressLR
    from infobatch_fast.budget import spend
    from infobatch_fast.data.dali import DaliLoader
    from infobatch_fast.data.loader import TorchLoader
    from infobatch_fast.infobatch import InfoBatch
    from infobatch_fast.plan import Batch, Plan


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
