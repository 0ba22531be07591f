"""What is kept of each sample in a run, against counts of our own."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files_made import fails

from infobatch_fast.data.cifar import make_synthetic
from infobatch_fast.plan import Plan
from infobatch_fast.train import checkpoint
from infobatch_fast.train.samples import PICTURED, TRACKED, SampleRecord

CPU = torch.device("cpu")
FORM = {
    "kept": np.int32,
    "scores": np.float32,
    "labels": np.int32,
    "tracked": np.int64,
    "score_history": np.float32,
    "pictured": np.int64,
    "pictures": np.uint8,
}


def plan_of(indices: list[int], n: int) -> Plan:
    return Plan(0, n, 0, torch.tensor(indices), torch.ones(len(indices)))


def record_of(n: int, epochs: int, seed: int = 0) -> tuple[SampleRecord, np.ndarray, np.ndarray]:
    """A record of random epochs; how often each was kept, and all scores (E, N)."""
    rng = np.random.default_rng(seed)
    samples = SampleRecord(n, CPU)
    kept, scores = np.zeros(n, int), np.full((epochs, n), np.nan, np.float32)
    for epoch in range(epochs):
        order = rng.permutation(n)[: rng.integers(1, n + 1)].tolist()
        scores[epoch] = rng.random(n)
        for i in order:
            kept[i] += 1
        samples.close_epoch(plan_of(order, n), torch.from_numpy(scores[epoch]))
    return samples, kept, scores


@pytest.mark.parametrize("n", [1, 2, 3, 95, 96, 97, 1000, 1024, 1025, 2047])
def test_arrays_of_a_run(tmp_path: Path, n: int) -> None:
    samples, kept, scores = record_of(n, 5)
    data = make_synthetic(n, 2, 2, seed=1)
    samples.write(tmp_path, data, torch.from_numpy(scores[-1]))
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.npy" for name in FORM)
    arrays = {name: np.load(tmp_path / f"{name}.npy", allow_pickle=False) for name in FORM}
    assert {name: array.dtype for name, array in arrays.items()} == FORM
    np.testing.assert_array_equal(arrays["kept"], kept)
    np.testing.assert_array_equal(arrays["scores"], scores[-1])
    np.testing.assert_array_equal(arrays["labels"], data.labels.numpy())
    np.testing.assert_array_equal(arrays["score_history"], scores[:, arrays["tracked"]])
    half = min(PICTURED, n) // 2
    pictured = arrays["pictured"]
    assert len(set(pictured.tolist())) == len(pictured) == 2 * half
    np.testing.assert_array_equal(kept[pictured[:half]], np.sort(kept)[:half])
    np.testing.assert_array_equal(kept[pictured[half:]], np.sort(kept)[::-1][:half])
    assert arrays["pictures"].shape == (2 * half, 32, 32, 3)
    for i, picture in zip(pictured.tolist(), arrays["pictures"], strict=True):
        np.testing.assert_array_equal(picture, data.images[i].numpy())


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 2047, 2048, 50_000, 2**31 + 5])
def test_tracked_samples_are_spread_over_all(monkeypatch, n: int) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **kwargs: zeros(1, **kwargs))
    tracked = SampleRecord(n, CPU).tracked.tolist()
    m = min(n, TRACKED)
    assert tracked == [i * n // m for i in range(m)]


def test_samples_not_seen_are_nan(tmp_path: Path) -> None:
    samples = SampleRecord(4, CPU)
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.nan])
    samples.close_epoch(plan_of([2, 0], 4), scores)
    scores.fill_(7)  # what was kept is a copy
    samples.close_epoch(plan_of([1], 4), scores)
    samples.write(tmp_path, make_synthetic(4, 2, 2), scores)
    history = np.load(tmp_path / "score_history.npy")
    np.testing.assert_array_equal(history, [[1, np.nan, 3, np.nan], [7, 7, 7, 7]])
    assert np.load(tmp_path / "kept.npy").tolist() == [1, 1, 1, 0]


def test_a_record_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    samples, kept, scores = record_of(1500, 3)
    checkpoint.save(tmp_path / "state", samples.state_dict())
    samples.close_epoch(plan_of([5], 1500), torch.zeros(1500))
    again = SampleRecord(1500, CPU)
    again.load_state_dict(checkpoint.load(tmp_path / "state"))
    assert again.kept.tolist() == kept.tolist()
    np.testing.assert_array_equal(torch.stack(again.history).numpy(), scores[:, again.tracked])
    again.close_epoch(plan_of([5], 1500), torch.zeros(1500))
    assert torch.equal(again.kept, samples.kept)
    assert torch.equal(torch.stack(again.history), torch.stack(samples.history))


def test_a_state_of_another_shape_changes_nothing() -> None:
    samples, kept, _ = record_of(10, 2)
    state = record_of(10, 3, seed=1)[0].state_dict()
    for broken in (
        {"kept": torch.zeros(1, dtype=torch.int32)},
        {"kept": torch.zeros(11, dtype=torch.int32)},
        {"kept": torch.zeros(10)},
        {"kept": 3},
        {"history": [torch.zeros(9)]},
        {"history": [torch.zeros(10, dtype=torch.float64)]},
        {"history": [1.0]},
        {"history": None},
    ):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            samples.load_state_dict({**state, **broken})
    with pytest.raises(KeyError):
        samples.load_state_dict({"history": state["history"]})
    assert samples.kept.tolist() == kept.tolist()
    assert len(samples.history) == 2
    samples.load_state_dict(state)
    assert len(samples.history) == 3


def test_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    samples, _, scores = record_of(10, 2)
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with fails("cannot write .*: No space left on device"):
        samples.write(tmp_path, make_synthetic(10, 2, 2), torch.from_numpy(scores[-1]))
    assert all(name.endswith(".npy") for name in os.listdir(tmp_path))
    for path in tmp_path.iterdir():
        np.load(path, allow_pickle=False)  # each whole
