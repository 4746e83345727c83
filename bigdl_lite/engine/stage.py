"""What pyspark.ml writes beside each stage, <path>/metadata: with Spark in a classic session, by this program through Connect.

A server of Spark Connect may have other disks than this program, and all of a stage belongs in one place. What is written is the
same, so Pipelines of either kind of session read it where both see the path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter

from bigdl_lite.data import files
from bigdl_lite.engine.spark import is_classic
from bigdl_lite.errors import WireError

_PART = "metadata/part-00000"


class StageWriter(MLWriter):
    def save(self, path: str) -> None:
        if is_classic(self.sparkSession):
            super().save(path)
            return
        if self.shouldOverwrite:
            files.remove(path)
        elif files.exists(f"{path}/{_PART}"):
            raise FileExistsError(f"{path} holds a saved stage: write().overwrite().save(path) replaces it")
        self.saveImpl(path)

    def metadata(self, stage: Any, path: str, params: Mapping[str, Any] | None = None, more: Mapping[str, Any] | None = None) -> None:
        """params  by name, in place of those that are set; more: whatever else is to be found there"""
        if is_classic(self.sparkSession):
            DefaultParamsWriter.saveMetadata(stage, path, self.sc, dict(more or {}), None if params is None else dict(params))
            return
        told = {param.name: value for param, value in stage._paramMap.items()} if params is None else params
        kind = type(stage)
        files.write(f"{path}/{_PART}", json.dumps({
            "class": f"{kind.__module__}.{kind.__name__}", "timestamp": int(time.time() * 1000), "uid": stage.uid,
            "sparkVersion": self.sparkSession.version, "paramMap": dict(told),
            "defaultParamMap": {param.name: value for param, value in stage._defaultParamMap.items()}, **(more or {}),
        }).encode())  # fmt: skip
        files.write(f"{path}/metadata/_SUCCESS", b"")


class StageReader(MLReader[Any]):
    def metadata(self, path: str) -> dict[str, Any]:
        if is_classic(self.sparkSession):
            return DefaultParamsReader.loadMetadata(path, self.sc)
        try:
            return dict(json.loads(files.read(f"{path}/{_part_of(path)}")))
        except (FileNotFoundError, ValueError) as error:
            raise WireError(f"{path} is not a saved stage: {error}") from error


def _part_of(path: str) -> str:
    """Spark gives the file a name that nobody else has."""
    found = files.open_folder(path, "metadata").entries()
    return next((f"metadata/{name}" for name in found if name.startswith("part-")), _PART)
