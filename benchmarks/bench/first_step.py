"""A process that ends after the first step of a head: `lymphfeat STORE` or `torchmil BAGS`."""

import importlib
import os
import sys
from pathlib import Path


def fit_with_lymphfeat(store: Path) -> None:
    for module in ("main", "fit_head"):  # as the command does
        importlib.import_module(f"lymphfeat_cli.{module}")
    import lymphfeat as lf

    def progress(done: int, total: int, text: str = "") -> None:
        if done:
            os._exit(0)

    one_split = lf.FitSettings(protocol="report", seeds=1)
    lf.fit_heads(store, agg="attention", settings=one_split, progress=progress)


def fit_with_torchmil(bags: Path) -> None:
    import torch
    from torch.utils.data import DataLoader
    from torchmil.data import collate_fn
    from torchmil.datasets import ProcessedMILDataset
    from torchmil.models import ABMIL

    labelled = [path.stem for path in sorted((bags / "labels").glob("*.npy"))]
    data = ProcessedMILDataset(
        features_path=str(bags / "features"),
        labels_path=str(bags / "labels"),
        bag_names=labelled,
        bag_keys=["X", "Y"],
        verbose=False,
    )
    batch = next(iter(DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate_fn)))
    model = ABMIL(in_shape=batch["X"].shape[2:], att_dim=128)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    _, losses = model.compute_loss(batch["Y"], batch["X"], batch["mask"])
    torch.autograd.backward(sum(losses.values()))
    optimizer.step()
    os._exit(0)


if __name__ == "__main__":
    {"lymphfeat": fit_with_lymphfeat, "torchmil": fit_with_torchmil}[sys.argv[1]](Path(sys.argv[2]))
    sys.exit("there was no first step")
