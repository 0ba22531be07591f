"""Plans and scores as they were drawn when the package was written: a change of any is announced.

Run as a program it prints what `GOLDENS` would be now.
"""

import hashlib

import pytest
import torch

from infobatch_fast import InfoBatch

EPOCHS = 16
SETTINGS = {
    **{name: {"policy": name} for name in ("soft", "random", "hard", "orderdp", "repb", "ucb")},
    "seta": {"policy": "seta"},
    "none": {"policy": "none"},
    "target": {"target_saving": 0.3},
    "bls, pods": {"score": "bls", "ratio_schedule": "pods", "seed": 1},
    "ablation": {"rescale": False, "anneal": False, "ratio": 0.7, "seed": 2},
}
GOLDENS = {
    "soft": "773b4db2983e3232",
    "random": "0cb4bac75fc7b690",
    "hard": "e9f67c77d652ce24",
    "orderdp": "f5661fe77343c7f1",
    "repb": "abfece75893c82ae",
    "ucb": "796bb79403fe7ca4",
    "seta": "7c5b19d8de797f38",
    "none": "62c849dfc383e098",
    "target": "377d18ef336b6f0b",
    "bls, pods": "d40f93ac37bd2adf",
    "ablation": "3dfc5b32d4ab383c",
}


def digest(settings: dict) -> str:
    infobatch = InfoBatch(1505, EPOCHS, device="cpu", **settings)
    generator = torch.Generator().manual_seed(100)
    sha = hashlib.sha256()
    for epoch in range(EPOCHS):
        plan = infobatch.sample(epoch, 100 if epoch % 2 else None)
        sha.update(plan.indices.numpy().tobytes() + plan.weights.numpy().tobytes())
        for batch in plan.batches(100):
            # Of 1024ths, whose sums are exact in any order.
            losses = torch.randint(4096, (len(batch.indices),), generator=generator) / 1024
            infobatch.update(losses, batch)
    sha.update(infobatch.scores.numpy().tobytes())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize("name", SETTINGS)
def test_plans_are_what_they_were(name: str) -> None:
    assert digest(SETTINGS[name]) == GOLDENS[name]


if __name__ == "__main__":
    for name, settings in SETTINGS.items():
        print(f'    "{name}": "{digest(settings)}",')
