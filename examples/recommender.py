"""Recommend items to users: tables, joins, a neural net, evaluation and output, in one Spark program.

    interactions ---- hold out one per user ----> test ---- with 99 unseen items each ----> HR@10, NDCG@10
         |
         +---> positives + 4 unseen items each ---> NeuMF.fit ---> score candidates ---> top 10 per user, parquet

    python examples/recommender.py --small
    spark-submit --master yarn --conf spark.python.daemon.module=bigdl_lite.engine.daemon \
        examples/recommender.py --output hdfs:///recommendations      # the setting: import torch once per executor

The interactions are made up, from a seed, so that there is something to find: each user has a taste, each item suits
some tastes, and some items are popular with everybody. Knowing popularity alone is the baseline to beat.

Source: He et al., "Neural Collaborative Filtering", WWW 2017, for the net (NeuMF), the negatives and the evaluation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchEstimator, TorchModel, local_session
from bigdl_lite.features import negative_samples


@dataclass(frozen=True)
class Size:
    """interactions is what is aimed at, before the limits on one user; batch counts rows over all workers."""

    users: int
    items: int
    interactions: int
    batch: int
    epochs: int


FULL = Size(users=6_040, items=3_706, interactions=1_050_000, batch=32_768, epochs=3)  # as large as MovieLens 1M
SMALL = Size(users=600, items=400, interactions=48_000, batch=4_096, epochs=10)

# ---- the data --------------------------------------------------------------------------------------------------------


def make_interactions(spark: SparkSession, size: Size, seed: int = 0, taste: float = 2.0) -> DataFrame:
    """(user long, item long, time long); the items of one user are distinct.

    A user picks items without replacement, with probability proportional to exp(taste * (u . v) / sqrt(d) + popularity).
    Adding Gumbel noise to these scores and taking the largest is the same draw, and one NumPy call.
    """
    d = 8  # length of the factors

    def pick(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        items = np.random.default_rng(seed)
        factors, popularity = items.standard_normal((size.items, d)), items.standard_normal(size.items)
        for batch in batches:
            for user in batch.column(0).to_pylist():
                rng = np.random.default_rng([seed, user])  # one per user: the same data in any number of partitions
                liking = taste * factors @ rng.standard_normal(d) / np.sqrt(d) + popularity
                # some users are much more active than others; the exponential has mean 1
                wanted = size.interactions / size.users * np.exp(rng.normal(-0.32, 0.8))
                count = int(np.clip(wanted, 20, size.items // 4))
                chosen = np.argpartition(liking + rng.gumbel(size=size.items), -count)[-count:]
                rng.shuffle(chosen)  # when somebody met an item has nothing to do with liking it
                yield pa.RecordBatch.from_pydict({"user": np.full(count, user), "item": chosen, "time": np.arange(count)})

    return spark.range(size.users).mapInArrow(pick, "user long, item long, time long")


def draw(frame: DataFrame, number: int, items: int, salt: int) -> DataFrame:
    """(user, item): `number` items, each equally likely, for every row of `frame`.

    A hash of the row takes the place of rand(): Spark may compute a partition again, and must then draw the same.
    """
    each = frame.withColumn("k", F.explode(F.sequence(F.lit(1), F.lit(number))))
    return each.select("user", F.pmod(F.xxhash64(*each.columns, F.lit(salt)), F.lit(items)).alias("item"))


def unseen(pairs: DataFrame, interactions: DataFrame) -> DataFrame:
    """The (user, item) pairs that are not interactions."""
    return pairs.join(interactions, ["user", "item"], "left_anti")


def first(frame: DataFrame, number: int, order: Column) -> DataFrame:
    """The first `number` rows of each user."""
    place = F.row_number().over(Window.partitionBy("user").orderBy(order, "item"))
    return frame.withColumn("place", place).where(f"place <= {number}")


def split(interactions: DataFrame) -> tuple[DataFrame, DataFrame]:
    """(train, test): the last interaction of each user is held out."""
    last = F.max("time").over(Window.partitionBy("user"))
    marked = interactions.withColumn("last", F.col("time") == last)
    return marked.where("NOT last").select("user", "item"), marked.where("last").select("user", "item")


def examples(train: DataFrame, items: int, negatives: int) -> DataFrame:
    """(user, item, label float): each interaction, and up to `negatives` items that this user has not met.

    The held-out item may be drawn: if it were spared, its absence would tell the net about the test.
    """
    return negative_samples(train, "user", "item", negatives, seed=1, items=items)


# ---- the net ---------------------------------------------------------------------------------------------------------


class NeuMF(nn.Module):
    """(user [B] int64, item [B] int64) -> [B] logits: a product of embeddings beside a small net on other embeddings."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.gmf_user, self.gmf_item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.mlp_user, self.mlp_item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.out = nn.Linear(width + 16, 1)
        for embedding in (self.gmf_user, self.gmf_item, self.mlp_user, self.mlp_item):
            nn.init.normal_(embedding.weight, std=0.01)  # torch's std of 1 would shout down what is learned

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.gmf_user(user) * self.gmf_item(item)  # [B, width]
        mixed = self.mlp(torch.cat([self.mlp_user(user), self.mlp_item(item)], 1))  # [B, 16]
        return self.out(torch.cat([product, mixed], 1)).squeeze(1)  # [B]


def fit(data: DataFrame, size: Size, engine: str = "auto", progress: str = "auto") -> TorchModel:
    return TorchEstimator(
        module=partial(NeuMF, size.users, size.items),
        loss=nn.BCEWithLogitsLoss(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        inputCols=["user", "item"],
        batchSize=size.batch,
        epochs=size.epochs,
        predictBatchSize=8192,
        engine=engine,
        progress=progress,
    ).fit(data)


# ---- how good is it, and what to recommend ---------------------------------------------------------------------------


def contest(test: DataFrame, interactions: DataFrame, items: int) -> DataFrame:
    """(user, item, held_out boolean): the held-out item of each user among 99 that the user never met."""
    others = unseen(draw(test.select("user"), 3 * 99, items, salt=2).distinct(), interactions)  # enough for 99 to be left
    others = first(others, 99, F.xxhash64("user", "item")).select("user", "item", F.lit(False).alias("held_out"))
    return test.withColumn("held_out", F.lit(True)).unionByName(others)


def quality(scored: DataFrame, score: str) -> tuple[float, float]:
    """(HR@10, NDCG@10) of a contest: how often the held-out item is in the first ten, and how far up."""
    # equal scores are ordered by a hash, or a net that says the same of all items might look perfect
    order = Window.partitionBy("user").orderBy(F.desc(score), F.xxhash64("item", "user"))
    places = scored.withColumn("place", F.row_number().over(order)).where("held_out")
    hit = F.col("place") <= 10
    found = places.select(F.avg(hit.cast("double")), F.avg(F.when(hit, 1 / F.log2(F.col("place") + 1)).otherwise(0.0))).first()
    return found[0], found[1]


def candidates(interactions: DataFrame, popularity: DataFrame, items: int) -> DataFrame:
    """(user, item): what is worth scoring for each user. All pairs would be 22 million at full size.

    The 100 most popular items, and 100 drawn at random so that the long tail has its chance, without what the user
    has met. A large catalogue would put a search for near embeddings in this place.
    """
    users = interactions.select("user").distinct()
    popular = popularity.orderBy(F.desc("popularity"), "item").limit(100).select("item")
    both = users.crossJoin(F.broadcast(popular)).unionByName(draw(users, 100, items, salt=3))
    return unseen(both.distinct(), interactions)


# ---- the program -----------------------------------------------------------------------------------------------------


def session() -> tuple[SparkSession, bool]:
    """(session, whether it is ours to stop). Under spark-submit the master is already chosen, and must stay."""
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # set by spark-submit for the Python program it starts
    mine = SparkSession.getActiveSession() is None
    return (SparkSession.builder.getOrCreate() if submitted else local_session(app_name="recommender")), mine


def run(spark: SparkSession, size: Size, engine: str, negatives: int, output: str) -> dict[str, float]:
    interactions = make_interactions(spark, size).persist()
    train, test = split(interactions)
    train = train.persist()
    popularity = train.groupBy("item").agg(F.count("*").alias("popularity")).persist()

    model = fit(examples(train, size.items, negatives), size, engine)

    rivals = contest(test, interactions, size.items).join(popularity, "item", "left").fillna(0, ["popularity"])
    scored = model.transform(rivals).persist()
    (hr, ndcg), (popular_hr, popular_ndcg) = quality(scored, "prediction"), quality(scored, "popularity")

    best = first(model.transform(candidates(interactions, popularity, size.items)), 10, F.desc("prediction"))
    best.select("user", "place", "item", F.col("prediction").alias("score")).write.mode("overwrite").parquet(output)

    epochs = [line for line in model.history if "steps" in line]  # the other lines are single steps
    seconds = sum(line["seconds"] for line in epochs)
    rows_per_s = sum(line["rows"] for line in epochs) / seconds
    sync_share = sum(line["sync_s"] for line in epochs) / seconds
    print(f"interactions {interactions.count():,}")
    print(f"training     {rows_per_s:,.0f} rows/s with the {model.engine} engine, {sync_share:.0%} of the time in sync")
    print("             HR@10   NDCG@10")
    print(f"NeuMF        {hr:.3f}   {ndcg:.3f}")
    print(f"popularity   {popular_hr:.3f}   {popular_ndcg:.3f}")
    return {
        "hr": hr, "ndcg": ndcg, "popular_hr": popular_hr, "popular_ndcg": popular_ndcg, "rows_per_s": rows_per_s,
        "sync_share": sync_share,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    options = argparse.ArgumentParser(description="Neural collaborative filtering with Spark.")
    options.add_argument("--small", action="store_true", help="600 users instead of 6,040")
    options.add_argument("--engine", choices=["auto", "barrier", "shuffle", "local"], default="auto")
    options.add_argument("--negatives", type=int, default=4, help="items that a user never met, for each that the user met")
    options.add_argument("--output", help="where the top ten go, as parquet; a folder that all executors reach. "
                                          "Not given: a temporary one, removed at the end")  # fmt: skip
    given = options.parse_args(arguments)
    spark, mine = session()
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = given.output or f"{folder}/recommendations"
            return run(spark, SMALL if given.small else FULL, given.engine, given.negatives, output)
    finally:
        if mine:
            spark.stop()


if __name__ == "__main__":
    main()
