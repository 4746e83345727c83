"""Texts by subject: words counted by Spark, texts as ids of one length, a bag of embeddings.

    docstring --> Vocabulary.fit (training rows only) --> token_ids --> ids [60] --> mean of embeddings --> subject

    python examples/text_classification.py

The texts are real: the docstrings of the functions and classes of Python's own library, as they lie in its source files; their
subject is the part of the library they stand in. No module is imported for that. The rival says the commonest subject.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchClassifier, local_session
from bigdl_lite.features import Vocabulary, token_ids

SUBJECTS = {  # files and folders of the library; what this Python does not have is left out
    "code": "ast.py bdb.py code.py dis.py importlib inspect.py pdb.py pydoc.py symtable.py tokenize.py trace.py traceback.py typing.py",
    "email": "email mailbox.py",
    "files": "_pyio.py bz2.py gzip.py lzma.py os.py pathlib pathlib.py posixpath.py shutil.py tarfile.py tempfile.py zipfile.py",
    "network": "ftplib.py http imaplib.py ipaddress.py poplib.py smtplib.py socket.py socketserver.py ssl.py urllib xmlrpc",
    "numbers": "_pydatetime.py _pydecimal.py calendar.py datetime.py fractions.py numbers.py random.py statistics.py",
    "processes": "asyncio concurrent multiprocessing queue.py selectors.py subprocess.py threading.py",
    "testing": "doctest.py unittest",
}
LENGTH = 60  # words of a text that are read; most have fewer


class Bag(nn.Module):
    """[B, LENGTH] ids -> [B, subjects]: the mean of the embeddings of the words, padding left out, and a linear layer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(words, 64, mode="mean", padding_idx=0)
        self.out = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, len(SUBJECTS)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mean(ids))


def docstrings() -> Iterator[tuple[str, int]]:
    """(text, number of its subject); texts of less than six words say too little."""
    library = Path(sysconfig.get_path("stdlib"))
    for label, names in enumerate(SUBJECTS.values()):
        for name in names.split():
            for path in sorted((library / name).rglob("*.py")) if not name.endswith(".py") else [library / name]:
                tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
                for node in ast.walk(tree):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                        text = ast.get_docstring(node) or ""
                        if len(text.split()) >= 6:
                            yield text, label


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    rows = list({text: (text, label) for text, label in docstrings()}.values())  # methods share their docstrings with each other
    frame = spark.createDataFrame(rows, "text string, label long")
    held_out = F.pmod(F.xxhash64("text"), F.lit(5)) == 0
    train, test = frame.where(~held_out), frame.where(held_out)

    vocabulary = Vocabulary.fit(train, "text", size=5_000, min_count=2)
    ids = partial(token_ids, column="text", vocabulary=vocabulary, length=LENGTH)
    model = TorchClassifier(
        module=partial(Bag, len(vocabulary)),
        optimizer=partial(torch.optim.Adam, lr=2e-2),
        inputCols=["ids"],
        batchSize=64,
        epochs=6,
        seed=0,
    ).fit(ids(train))
    accuracy = model.evaluate(ids(test), ["accuracy"])["accuracy"]
    rival = commonest(train, test)
    asked = ["Send a message to the server and wait for its reply.", "Return the greatest common divisor of two integers."]
    said = model.transform(ids(spark.createDataFrame([(text,) for text in asked], "text string"))).collect()

    print(f"texts               {len(rows):,} of {len(SUBJECTS)} subjects, {len(vocabulary):,} words")
    print(f"test accuracy       {accuracy:.3f}")
    print(f"commonest subject   {rival:.3f}")
    for row in said:
        print(f"{list(SUBJECTS)[int(row.prediction)]:<19} {row.text}")
    return {"accuracy": accuracy, "rival": rival}


def commonest(train: DataFrame, test: DataFrame) -> float:
    """The accuracy of always saying the commonest label of train."""
    label = train.groupBy("label").count().orderBy(F.desc("count")).first().label
    return test.select(F.avg((F.col("label") == label).cast("double"))).first()[0]


if __name__ == "__main__":
    main(local_session(app_name="text_classification"))
