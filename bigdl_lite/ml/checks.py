"""The ten rules of doctor(): facts -> what was found, and what to do. Pure, so that each can be tried without Spark.

    ok      as it should be
    warn    training works; something is slower or weaker than it could be, or is not known
    fail    a fit, or what a fit promises, will not work until it is changed

    p  slots
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bigdl_lite.engine.worker import versions
from bigdl_lite.ml.facts import Facts, Place, Slow, Unknown

STATUSES = ("ok", "warn", "fail")  # from good to bad

_GIB, _MIB = 2**30, 2**20
_LEAST = _GIB  # bytes of memory or disk under which a fit may run short
_MODEL = 10  # million parameters that shuffle should be able to bring through the driver
_DAEMON = "bigdl_lite.engine.daemon"
_JAVA = {(3, 5): (8, 11, 17), (4, 0): (17, 21), (4, 1): (17, 21)}  # what Spark's own pages name, by version
_JAVA_SINCE = (17, 21, 25)  # of later versions


class Found(NamedTuple):
    status: str
    found: str
    advice: str = ""


def _ok(found: str) -> Found:
    return Found("ok", found)


def _warn(found: str, advice: str = "") -> Found:
    return Found("warn", found, advice)


def _fail(found: str, advice: str = "") -> Found:
    return Found("fail", found, advice)


def said(error: Exception) -> str:
    """An error in one line: of Spark's pages of stack traces the Python error in them."""
    if isinstance(error, TimeoutError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b.*: ", line) and not line.startswith(("py4j", "org."))]
    return f"{type(error).__name__}: {(named or lines or ['without a message'])[0][:400]}"


def _tasks(facts: Facts) -> list[Place]:
    """What tasks said. Raises Unknown where none did: "slots" says why, once."""
    try:
        return facts.tasks
    except Unknown:
        raise
    except Exception as error:
        raise Unknown("the tasks did not answer, see slots") from error


def _executors(facts: Facts) -> list[Place]:
    """One place of each executor."""
    return list({place.executor: place for place in _tasks(facts)}.values())


def _setting(facts: Facts, name: str, default: str = "") -> str:
    return facts.conf.get(name, default)


def _number(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def java(facts: Facts) -> list[Found]:
    number = _number(facts.java)
    major = number[1] if number[0] == 1 else number[0]  # 1.8 is 8
    known = _JAVA.get(_number(facts.spark), _JAVA_SINCE)
    found = f"Java {facts.java}; Spark {facts.spark} is made for {', '.join(map(str, known))}"
    if major in known:
        return [_ok(found)]
    return [(_fail if major < known[0] else _warn)(found, f"set JAVA_HOME to a Java {known[-1]} before Spark starts")]


def packages(facts: Facts) -> list[Found]:
    """Differences that matter: what a fit refuses (engine/worker.py), Python's minor version, and whatever is absent."""
    mine, executors = facts.driver.versions, _executors(facts)
    told = []
    for place in executors:
        for name, wanted in mine.items():
            found = place.versions.get(name, "")
            if found != wanted:
                matters = not found or (name in (*versions(), "python") and _essence(name, found) != _essence(name, wanted))
                told.append((_fail if matters else _warn)(f"{name} is {found or 'absent'} on {place.executor}"))
    same = sum(place.versions == mine for place in executors)
    head = ", ".join(f"{name} {found or 'absent'}" for name, found in mine.items())
    told.insert(0, _ok(f"{head} at the driver, and on {same} of {_count(len(executors), 'executor')}"))
    if any(status == "fail" for status, *_ in told):
        told.append(_ok("")._replace(advice="install the same on all, or send them along (spark-submit --archives, --py-files)"))
    elif len(told) > 1:
        told.append(_ok("")._replace(advice="results may differ in the last bits: install the same on all"))
    return told


def _essence(name: str, version: str) -> Any:
    return version if name == "bigdl_lite" else _number(version)  # of torch and Python a patch, or a build, is no other version


def slots(facts: Facts) -> list[Found]:
    p, cpus = facts.slots, _setting(facts, "spark.task.cpus", "1")
    if p < 1:
        advice = (
            "does the cluster have cores and memory that are free? spark.scheduler.minRegisteredResourcesRatio=1 with "
            "spark.cores.max makes a program wait for executors when it starts"
        )
        return [_fail(f"no slot: no executor has registered with {facts.master}", advice)]
    try:
        tasks = facts.tasks
    except Slow as error:
        return [_warn(f"{_count(p, 'slot')}; {error}", "call doctor(spark) once more, or give it longer, deadline=60")]
    hosts = sorted({place.host for place in tasks})
    where = f"{_count(len(_executors(facts)), 'executor')} on {_count(len(hosts), 'host')}"
    told = [_ok(f"{_count(p, 'slot')} in {where}, {_count(int(cpus), 'core')} a task; numWorkers=None means {p}")]
    if facts.elastic:
        told.append(_warn("the number of executors changes by itself", "set numWorkers: None takes the slots of the moment"))
    for host in hosts:
        here = [place for place in tasks if place.host == host]
        if len(here) > here[0].cores:
            found = f"{len(here)} slots on the {_count(here[0].cores, 'core')} of {host}"
            told.append(_warn(found, "workers of one core take turns: set numWorkers to the number of cores"))
    return told


def barrier(facts: Facts) -> list[Found]:
    if facts.elastic and not facts.local:
        advice = 'engine="shuffle" trains here; "barrier" needs a fixed number of executors'
        return [_warn("not possible: spark.dynamicAllocation.enabled is true", advice)]
    _tasks(facts)
    try:
        ranks = facts.ranks
    except Unknown:
        raise
    except Exception as error:
        advice = 'engine="shuffle" needs no barrier; "barrier" needs all its slots at once'
        return [_fail(f"a stage of {_count(facts.slots, 'task')} did not meet: {said(error)}", advice)]
    return [_ok(f"a stage of {_count(len(ranks), 'task')} met, and was over, in {facts.met_s:.1f} s")]


def peers(facts: Facts) -> list[Found]:
    tasks = _tasks(facts)
    return [_to_driver(facts, tasks), _to_one_another(facts)]


def _to_driver(facts: Facts, tasks: list[Place]) -> Found:
    advice = "until then barrier shows no live lines, takes no checkpoints, and begins anew after a loss"
    try:
        host = facts.door[0]
    except OSError as error:
        asked = _setting(facts, "spark.driver.host")
        return _warn(
            f"the driver cannot listen on spark.driver.host={asked}: {error}", f"set it to an address of the driver's machine; {advice}"
        )
    cut = [place for place in tasks if place.driver_error]
    if cut:
        found = f"{len(cut)} of {_count(len(tasks), 'task')} cannot reach the driver at {host}: {cut[0].driver_error}"
        return _warn(found, f"let executors connect to the driver, on any port; {advice}")
    return _ok(f"all {_count(len(tasks), 'task')} reach the driver at {host}")


def _to_one_another(facts: Facts) -> Found:
    try:
        ranks = facts.ranks
    except Exception:
        return Found("ok" if facts.elastic else "warn", "without a barrier stage nobody calls a peer; shuffle needs none")
    lost = [f"rank {r.rank} cannot listen on {r.host}: {r.listens}" for r in ranks if r.listens]
    lost += [f"rank {r.rank} on {r.host} cannot reach rank {other}: {why}" for r in ranks for other, why in r.unreached.items()]
    if not lost:
        return _ok(f"peers reach one another on {', '.join(sorted({r.host for r in ranks})[:3])}")
    apart = any(len(r.seen) < len(ranks) for r in ranks)  # else they meet in memory, and most algorithms need no socket
    advice = 'let executors connect to one another, on any port, or take engine="shuffle"'
    return (_fail if apart else _warn)(lost[0] + (f" (and {len(lost) - 1} more)" if lost[1:] else ""), advice)


def memory(facts: Facts) -> list[Found]:
    """Memory that is shared is that of the machine or container (comm/window.py), however small its /dev/shm is."""
    executors = _executors(facts)
    for place in executors:
        if place.memory_error:
            advice = "its workers will speak over sockets, which is slower"
            return [_warn(f"{place.host} has no memory to share: {place.memory_error}", advice)]
    least = min([facts.driver, *executors], key=lambda place: place.memory)
    q = max(sum(place.host == other.host for place in facts.tasks) for other in executors)
    room = least.memory / 4e6 / (q + 1)  # one copy of the weights, and a gradient for each worker
    found = f"{least.memory / _GIB:.1f} GiB free where least is ({least.host}): {room:,.0f} M parameters for {_count(q, 'worker')}"
    advice = "give the machine or container more memory, or put fewer workers on it"
    told = [_ok(found) if least.memory >= _LEAST else _warn(found, advice)]
    try:
        ranks = facts.ranks
    except Exception:
        return told
    for r in ranks:
        blind = sorted({other.rank for other in ranks if other.host == r.host} - set(r.seen))
        if blind:
            advice = "executors in containers of their own, or of several users, are a node each, and speak over sockets"
            return [*told, _warn(f"rank {r.rank} cannot look at the memory of rank {blind[0]} on the same host {r.host}", advice)]
    return told


def arrow(facts: Facts) -> list[Found]:
    name = "spark.sql.execution.arrow."
    rows, on = int(_setting(facts, name + "maxRecordsPerBatch", "10000")), _setting(facts, name + "pyspark.enabled", "false").lower()
    told = [_ok(f"maxRecordsPerBatch {rows}, arrow.pyspark.enabled {on}")]
    if on != "true":
        told.append(_warn("toPandas pickles row by row", f"set {name}pyspark.enabled=true (a fit does without)"))
    if rows <= 0:
        told.append(_warn("a partition is one batch in the memory of its task", f"set {name}maxRecordsPerBatch=10000"))
    elif rows < 1000:
        told.append(_warn("such batches cost more than they hold, but for large images", f"set {name}maxRecordsPerBatch=10000"))
    return told


def gpu(facts: Facts) -> list[Found]:
    amount, tasks = _setting(facts, "spark.task.resource.gpu.amount", "0"), _tasks(facts)
    given = [place for place in tasks if place.gpus]
    if not given:
        if float(amount):
            advice = "does the cluster manager know of its GPUs (spark.worker.resource.gpu.amount and a discovery script)?"
            return [_fail(f"spark.task.resource.gpu.amount={amount}, and no task was given a GPU", advice)]
        idle = next((place for place in tasks if place.gpu_devices), None)
        if idle:
            advice = (
                "set spark.executor.resource.gpu.amount, a discovery script, and spark.task.resource.gpu.amount=1 (or resourceProfile "
                "of the estimator); in local[...] device='cuda' takes them"
            )
            return [_warn(f"{idle.host} has {_count(idle.gpu_devices, 'GPU')}, and tasks are given none", advice)]
        return [_ok("none there, none asked for: workers compute on the CPU")]
    blind = next((place for place in given if place.cuda != "yes"), None)
    if blind:
        advice = "until a torch with CUDA, and its driver, is there and sees that GPU, all workers compute on CPUs"
        return [_fail(f"{blind.host} gives GPU {', '.join(blind.gpus)} to a task, and there {blind.cuda}", advice)]
    found = f"{len(given)} of {_count(len(tasks), 'task')} have a GPU that torch can use"
    if 0 < float(amount) < 1:
        advice = "workers that share one meet in memory; set it to 1 for NCCL, which needs a GPU a worker"
        return [_warn(f"{found}, and share it: spark.task.resource.gpu.amount={amount}", advice)]
    return [_ok(found)]


def disk(facts: Facts) -> list[Found]:
    """The folders of SPARK_LOCAL_DIRS: shuffle keeps its shares in the first, Spark its blocks in all."""
    told, free = [], []
    for place in _executors(facts):
        for path, nbytes, error in place.disks:
            if error:
                advice = "set spark.local.dir (SPARK_LOCAL_DIRS of the workers) to a folder that they may write to"
                told.append(_fail(f"{place.host} cannot write to {path}: {error}", advice))
            elif nbytes < _LEAST:
                advice = "shuffle keeps the rows of every worker there, decoded: make room, or set spark.local.dir"
                told.append(_warn(f"{nbytes / _MIB:.0f} MiB free in {path} on {place.host}", advice))
            else:
                free.append((nbytes, f"{nbytes / _GIB:.0f} GiB free in {path} on {place.host}, where least is"))
    return told or [_ok(min(free)[1])]


def settings(facts: Facts) -> list[Found]:
    """What makes tasks cheap, with the gains that were measured (README.md, "On a cluster"), and what limits shuffle."""
    told = []
    if _setting(facts, "spark.python.daemon.module") == _DAEMON:
        told.append(_ok("torch is imported once an executor"))
    else:
        told.append(_warn("every Python worker imports torch by itself", f"spark.python.daemon.module={_DAEMON}: saves 2 to 4 s each"))
    name = "spark.python.unix.domain.socket.enabled"
    if _setting(facts, name, "false").lower() == "true":
        told.append(_ok("workers speak over Unix domain sockets"))
    elif _number(facts.spark) >= (4, 1):
        told.append(_warn("workers speak over TCP", f"{name}=true halves the cost of a short task, 48 ms for 96 ms"))
    if _setting(facts, "spark.python.worker.reuse", "true").lower() != "true":
        told.append(_warn("every task gets a new Python worker", "spark.python.worker.reuse=true: a worker keeps what it has imported"))
    if not facts.classic:
        return told
    try:
        if not all(place.thp for place in facts.tasks):
            gain = "20 % of a backward pass with 25 M parameters (the daemon sees to it)"
            told.append(_warn("torch takes small pages", f"spark.executorEnv.THP_MEM_ALLOC_ENABLE=1 saves {gain}"))
    except Exception:  # what tasks do not say, slots explains
        told.append(_ok("pages of torch not known"))
    if facts.encrypts:
        what = "shows no live lines and takes no checkpoints" if facts.local else "is refused without BarrierEngine(allow_clear=True)"
        told.append(_warn(f"Spark's encryption is on: barrier {what}"))
    heap, most = facts.heap, facts.most_result
    room = min(heap / 2.5, most or heap) / 4e6  # as engine/shuffle.py requires
    limits = f"driver memory {heap / _GIB:.1f} GiB, maxResultSize {f'{most / _GIB:.1f} GiB' if most else 'without limit'}"
    found = f"{limits}: {room:,.0f} M parameters in shuffle on several machines"
    if room < _MODEL and not facts.local:
        told.append(_warn(found, "raise spark.driver.memory and spark.driver.maxResultSize for larger ones"))
    else:
        told.append(_ok(found))
    return told


RULES: Mapping[str, Callable[[Facts], list[Found]]] = {
    "java": java, "packages": packages, "slots": slots, "barrier": barrier, "peers": peers,
    "memory": memory, "arrow": arrow, "gpu": gpu, "disk": disk, "settings": settings,
}  # fmt: skip
