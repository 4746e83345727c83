"""Lines and histories made up for the tests, in the form that engines tell them."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]


def start(steps: int = 4, epochs: int = 2, rows: int = 20) -> Line:
    return {"start": {"steps": steps, "epochs": epochs, "rows": rows}}


def step(number: int, **more: Any) -> Line:
    """A step of 10 ms: 6 of compute, 3 of sync, 1 of data."""
    line = {
        "step": number, "epoch": 0, "loss": 1.0, "rows": 10, "weight": 10.0, "lr": 0.1, "seconds": 0.010, "compute_s": 0.006,
        "sync_s": 0.003, "data_s": 0.001, "bytes_sent": 100, "sync_ratio": 0.5,
    }  # fmt: skip
    return {**line, **more}


def epoch(number: int, steps: int, **more: Any) -> Line:
    one = step(0)
    sums = {key: one[key] * steps for key in ("rows", "seconds", "compute_s", "sync_s", "data_s", "bytes_sent")}
    return {"epoch": number, "steps": steps, **sums, "loss": 1.0, "sync_ratio": 0.5, **more}


def validation(done: int, seconds: float = 0.02, **metrics: float) -> Line:
    return {"validation": done, **metrics, "seconds": seconds}


def history(
    epochs: int = 3, steps: int = 10, validated: bool = False, every: int = 1, noise: float = 0.0, **phases: Any
) -> list[Line]:  # fmt: skip
    """A loss that falls as 1 / (1 + 3 epochs); every: only each every-th step is kept. phases: seconds of each step, by key."""
    lines: list[Line] = []
    for e in range(epochs):
        made = []
        for s in range(steps):
            done = e * steps + s
            loss = 1 / (1 + 3 * done / steps) * (1 + noise * (((done * 7919) % 101) / 50 - 1))
            each = step(done, epoch=e, loss=loss, lr=0.1 / (1 + e), **phases)
            each["seconds"] = phases.get("seconds", each["compute_s"] + each["sync_s"] + each["data_s"])
            made.append(each)
        lines += [line for line in made if line["step"] % every == 0]
        sums = {key: sum(x[key] for x in made) for key in ("rows", "seconds", "compute_s", "sync_s", "data_s", "bytes_sent")}
        mean, found = sum(x["loss"] for x in made) / steps, {}
        if validated:
            value = mean * (1.1 if e < epochs - 1 else 1.3)
            found = {"val_loss": value, "val_accuracy": 1 - value / 2}
            lines.append(validation((e + 1) * steps, 0.02, **found))
        lines.append({"epoch": e, "steps": steps, **sums, "loss": mean, **found})
    return lines
