# Databricks notebook source
# MAGIC %md
# MAGIC # bigdl_lite on Databricks
# MAGIC
# MAGIC A torch module is trained on a DataFrame, by the executors of this cluster, in the session that the notebook has. Any ML
# MAGIC runtime has torch, NumPy and scikit-learn; on others the next cell brings torch.

# COMMAND ----------

# MAGIC %pip install bigdl_lite

# COMMAND ----------

# MAGIC %md
# MAGIC ## A table
# MAGIC
# MAGIC Here it is made from scikit-learn's handwritten digits. With a table of your own: `table = spark.table("catalog.schema.name")`.
# MAGIC `volume` is where the model goes: a folder of a Unity Catalog volume, which the driver and all executors reach.

# COMMAND ----------

volume = "/Volumes/main/default/models"

# COMMAND ----------

from sklearn.datasets import load_digits

images = load_digits()
rows = list(zip(range(len(images.data)), (images.data / 16).tolist(), images.target.tolist(), strict=True))
table = spark.createDataFrame(rows, "id long, features array<float>, label long")
train, test = table.where("id % 5 > 0"), table.where("id % 5 = 0")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Fit
# MAGIC
# MAGIC `engine="auto"` takes the barrier engine where all workers fit at once, and else the shuffle engine: so it does on clusters
# MAGIC that grow and shrink. `numWorkers` is one for each slot, if it is not set.

# COMMAND ----------

from functools import partial

import torch
from torch import nn

from bigdl_lite import TorchClassifier


def make_net():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


classifier = TorchClassifier(
    module=make_net,
    optimizer=partial(torch.optim.Adam, lr=1e-2),
    batchSize=128,
    epochs=10,
    validationFraction=0.1,
    metrics=["accuracy"],
    seed=0,
)
model = classifier.fit(train)
print(model.summary)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Score, and measure
# MAGIC
# MAGIC `transform` is lazy and keeps all columns; `model.udf()` is the same as a function for SQL.

# COMMAND ----------

accuracy = model.evaluate(test, ["accuracy"])["accuracy"]
print(f"test accuracy {accuracy:.3f}")

# COMMAND ----------

test.createOrReplaceTempView("digits_to_read")
spark.udf.register("read_digit", model.udf())
wrong = spark.sql("SELECT id, label, read_digit(features).prediction AS said FROM digits_to_read").where("said <> label")
print(f"{wrong.count()} of {test.count()} are read wrongly")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Save, and load again
# MAGIC
# MAGIC The module was defined in this notebook, which no other program can import: loading is told what it is.

# COMMAND ----------

from bigdl_lite import TorchModel

path = f"{volume}/digits"
model.write().overwrite().save(path)
again = TorchModel.load(path, module=make_net)
assert again.transform(test).select("id", "prediction").exceptAll(model.transform(test).select("id", "prediction")).count() == 0
