"""What became of each sample in a run: how often it was kept, and its scores over the epochs.

Dimensions: N samples, E epochs, M samples tracked, P samples pictured.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.plan import Plan
from infobatch_fast.train.records import write_atomically

TRACKED = 1024  # samples whose scores are kept for each epoch: 4 kB an epoch
PICTURED = 48  # samples whose images are kept, half of them the least kept ones


class SampleRecord:
    """Counts on the device, and the scores of evenly spaced samples on the host.

    Args:
        num_samples: N.
        device: of the plans.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.kept = torch.zeros(num_samples, dtype=torch.int32, device=device)
        tracked = min(num_samples, TRACKED)
        self.tracked = torch.arange(tracked, device=device) * num_samples // tracked
        self.history: list[Tensor] = []  # (M,) float32 an epoch

    def close_epoch(self, plan: Plan, scores: Tensor) -> None:
        """Count an epoch's samples, and copy the tracked ones' scores; the host waits for that."""
        self.kept[plan.indices] += 1  # no sample is twice in a plan
        self.history.append(scores[self.tracked].cpu())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"kept": self.kept, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict()`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is of another shape; nothing is
                changed then.
        """
        history = list(state["history"])
        shapes = {(row.shape, row.dtype) for row in history}
        if shapes - {(self.tracked.shape, torch.float32)}:
            raise ValueError(f"a history of scores of {sorted(map(str, shapes))}")
        kept = state["kept"]
        if kept.shape != self.kept.shape or kept.dtype != self.kept.dtype:
            raise ValueError(f"counts of {kept.dtype} and shape {tuple(kept.shape)}")
        self.kept.copy_(kept)
        self.history = history

    def write(self, folder: Path, data: Dataset, scores: Tensor) -> None:
        """Write the run's arrays, each a .npy file.

        kept (N,) int32, epochs that trained on the sample; scores (N,) float32, the last, NaN where
        not seen; labels (N,) int32; tracked (M,) int64, samples; score_history (E, M) float32,
        theirs after each epoch; pictured (P,) int64, the samples kept least, ascending, and then
        those kept most, descending; pictures (P, 32, 32, 3) uint8, their images.

        Raises:
            UserError: the disk is full or read-only.
        """
        kept = self.kept.cpu().numpy()
        half = min(PICTURED, kept.size) // 2
        ranked = np.argsort(kept, kind="stable")
        pictured = np.concatenate([ranked[:half], ranked[::-1][:half]])  # none twice
        pictures = data.images[torch.from_numpy(pictured).to(data.images.device)]
        arrays = {
            "kept": kept,
            "scores": scores.cpu().numpy(),
            "labels": data.labels.cpu().numpy().astype(np.int32),
            "tracked": self.tracked.cpu().numpy(),
            "score_history": torch.stack(self.history).numpy(),
            "pictured": pictured,
            "pictures": pictures.cpu().numpy(),
        }
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_atomically(folder / f"{name}.npy", buffer.getvalue())
