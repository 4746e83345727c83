"""Anomalies in series: a net learns to foretell the next hour, and where it is far off, something has happened.

    value by sensor and hour --> windows of 24 hours, and the one after --> LSTM.fit on the earlier part
                                                                             |
    |foretold - seen| on the later part  >  twice the 99.5 % quantile of the earlier part's  -->  alarm

    python examples/anomaly_detection.py

The series are made up, from a seed: each of four sensors has a wave a day, of its own height and phase, one a half day, and
noise. In the later part, single hours are moved by 1.5 up or down, towards the middle, so that they stay in the usual range:
a limit on the values themselves, set by the same quantile, is the rival, and sees next to none of them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchRegressor, local_session
from bigdl_lite.features import split_by_time, windows

HOURS, SENSORS, EARLIER = 24 * 60, 4, 0.7


class Forecast(nn.Module):
    """[B, 24, 1] the values of 24 hours -> [B] the next one.

    tampered  in training, this part of the values is moved by lot, so that the net learns not to trust a single one: an odd hour
              would spoil the forecasts of the day after it, and each of them would be an alarm
    """

    def __init__(self, tampered: float) -> None:
        super().__init__()
        self.tampered = tampered
        self.lstm = nn.LSTM(1, 24, batch_first=True)
        self.out = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + (torch.rand_like(x) < self.tampered) * 1.5 * torch.randn_like(x)
        states, _ = self.lstm(x)  # [B, 24, 24]
        return self.out(states[:, -1]).squeeze(1)


def series(spark: SparkSession, seed: int = 0) -> DataFrame:
    """(sensor long, hour long, value double, odd boolean): odd hours are those that were tampered with."""
    rng = np.random.default_rng(seed)
    hour = np.arange(HOURS)
    frames = []
    for sensor in range(SENSORS):
        height, phase = rng.uniform(1.0, 1.6), rng.uniform(0, 2 * np.pi)
        value = height * np.sin(hour * np.pi / 12 + phase) + 0.4 * np.sin(hour * np.pi / 6) + 0.1 * rng.standard_normal(HOURS)
        odd = np.zeros(HOURS, bool)
        odd[rng.choice(np.arange(int(EARLIER * HOURS) + 30, HOURS, 12), 15, replace=False)] = True  # at least 12 hours apart
        value[odd] -= 1.5 * np.sign(value[odd])
        frames.append(pd.DataFrame({"sensor": sensor, "hour": hour, "value": value, "odd": odd}))
    return spark.createDataFrame(pd.concat(frames))


def quality(frame: DataFrame, alarm: str) -> tuple[float, float]:
    """(precision, recall): how many alarms are of odd hours, how many odd hours have one."""
    right, alarms, odd = frame.selectExpr(f"count_if({alarm} AND odd)", f"count_if({alarm})", "count_if(odd)").first()
    return right / max(1, alarms), right / odd


def main(spark: SparkSession, tampered: float = 0.1) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    rows = series(spark)
    frame = windows(rows, "hour", "value", length=24, horizon=1, by="sensor", target="value")
    # a window is named by its last hour; what it foretells is the hour after
    frame = frame.withColumn("hour", F.col("hour") + 1).join(rows.select("sensor", "hour", "odd"), ["sensor", "hour"]).cache()
    earlier, later = split_by_time(frame, "hour", EARLIER)
    model = TorchRegressor(
        module=partial(Forecast, tampered),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        inputCols=["window"],
        labelCol="target",
        predictionCol="foretold",
        batchSize=128,
        epochs=8,
        seed=0,
    ).fit(earlier)

    before, after = (model.transform(part).withColumn("error", F.expr("abs(foretold - target)")) for part in (earlier, later))
    error, size = before.select(F.expr("percentile(error, 0.995)"), F.expr("percentile(abs(target), 0.995)")).first()
    precision, recall = quality(after, f"error > {2 * error}")
    rival_precision, rival_recall = quality(after, f"abs(target) > {size}")
    print(f"limits                 {2 * error:.2f} for the error, {size:.2f} for the value")
    print("                       precision   recall")
    print(f"error of the forecast       {precision:.2f}     {recall:.2f}")
    print(f"size of the value           {rival_precision:.2f}     {rival_recall:.2f}")
    frame.unpersist()
    return {"precision": precision, "recall": recall, "rival_recall": rival_recall}


if __name__ == "__main__":
    main(local_session(app_name="anomaly_detection"))
