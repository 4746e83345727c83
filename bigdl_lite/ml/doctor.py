"""doctor(spark): what a session is for a fit, before the first one.

    facts.py     settings, one job over all slots, one tiny barrier stage   -> Facts
    checks.py    ten rules                                                  Facts -> what was found, what to do
    here         Diagnosis, a value whose repr is a table
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pyspark.sql import SparkSession

from bigdl_lite.data.manifest import VERSION
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml.checks import RULES, STATUSES, Found, said
from bigdl_lite.ml.facts import Facts, Unknown, gather

_WIDTH = 118
_LEAST_S = 3.0


@dataclass(frozen=True)
class Check:
    """One line of a Diagnosis. status is "ok", "warn" or "fail" (see checks.py); advice is "" where there is nothing to do."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What doctor() found; its repr is a table.

    engine    what engine="auto" takes with numWorkers=None; "" where none can train. why says by which rule
    about     versions and master
    seconds   that it took
    """

    checks: tuple[Check, ...]
    engine: str
    why: str
    about: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for json.dumps."""
        return {"ok": self.ok, **asdict(self)}

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(c.status == status for c in self.checks)} {status}" for status in STATUSES)
        chosen = f'engine="auto" takes "{self.engine}": ' if self.engine else ""
        lines = [f"{self.about}: {counts}, {self.seconds:.1f} s", *textwrap.wrap(chosen + self.why, _WIDTH), ""]
        names = max((len(c.name) for c in self.checks), default=0)
        for c in self.checks:
            head = f"{c.status:<4}  {c.name:<{names}}  "
            blank = " " * len(head)
            lines += textwrap.wrap(c.found, _WIDTH, initial_indent=head, subsequent_indent=blank)
            lines += textwrap.wrap(c.advice and f"-> {c.advice}", _WIDTH, initial_indent=blank, subsequent_indent=blank + "   ")
        return "\n".join(lines)


def doctor(spark: SparkSession, deadline: float = 10.0) -> Diagnosis:
    """Ten checks of a session, and the engine that engine="auto" takes in it. Prints nothing: the repr of the result is a table.

    deadline  seconds after which its jobs are cancelled; what is then not known is said in the checks. One to two seconds are
              enough where Python workers run already; the first of an executor may take five to start

    Runs two jobs over all slots, which wait like any other while these are taken. Nothing of the session is changed, and nothing
    stays cached in it. No check raises: its error is what it found.

    Raises  RecipeError where deadline is shorter than its tasks need, 3 seconds.
    """
    if not deadline >= _LEAST_S:
        raise RecipeError(f"deadline={deadline}: the tasks of doctor need {_LEAST_S} seconds to answer")
    began = time.monotonic()
    return diagnose(gather(spark, deadline - 0.3), lambda: time.monotonic() - began)


def diagnose(facts: Facts, clock: Callable[[], float] = lambda: 0.0) -> Diagnosis:
    """All rules over facts."""
    checks = tuple(_check(name, RULES[name], facts) for name in RULES)
    engine, why = choice(facts)
    through = "" if facts.classic else "Spark Connect to "
    about = f"bigdl_lite {VERSION} on Spark {_or(lambda: facts.spark, '?')}, {through}{_or(lambda: facts.master, '?')}"
    return Diagnosis(checks, engine, why, about, round(clock(), 3))


def choice(facts: Facts) -> tuple[str, str]:
    """What engine="auto" takes (ml/engines.py decides), and the reason; ("", reason) where nothing can train."""
    try:
        engine, p = facts.engine, facts.slots
    except Exception as error:
        return "", f"no engine can be chosen: {said(error)}"
    if engine != "barrier":
        if facts.elastic:
            return engine, "executors come and go (spark.dynamicAllocation.enabled), and Spark has no barrier stage there"
        return engine, "Spark's encryption is on, and ranks of several machines would speak past it in clear"
    if not facts.classic:
        return engine, f"{p} workers fit into {p} slots at once; through Spark Connect there is no shuffle"
    why = f"{p} workers fit into {p} slots at once, " + (
        "on one machine" if facts.local else "the number of executors is fixed, and Spark encrypts nothing"
    )
    trouble = [name for name in ("barrier", "peers") if _check(name, RULES[name], facts).status == "fail"]
    if trouble:
        why += f'; but see {" and ".join(trouble)}: until that is mended, set engine="shuffle"'
    return engine, why


def _check(name: str, rule: Callable[[Facts], list[Found]], facts: Facts) -> Check:
    """What a rule says, in one line; a rule that raises has found that."""
    try:
        told = rule(facts)
    except Unknown as error:
        return Check(name, "warn", f"not known: {error}")
    except Exception as error:
        return Check(name, "fail", said(error))
    status = max((found.status for found in told), key=STATUSES.index)
    return Check(name, status, *("; ".join(filter(None, texts)) for texts in list(zip(*told, strict=True))[1:]))


def _or(ask: Callable[[], Any], other: str) -> Any:
    try:
        return ask()
    except Exception:
        return other
