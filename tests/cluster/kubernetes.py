"""As much of Kubernetes as Spark asks for: an API server that keeps objects, and a kubelet that runs pods as processes of this machine.

A pod is read as a kubelet reads it: arguments, environment, config maps, folders that are empty. What an image and a network would do
is done by replacing text: paths of the container become folders here, and the names of services the loopback address. There are no
containers, no limits, no accounts and no DNS, so nothing is learned about these.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]

PATH = re.compile(r"/apis?/[^?]*?namespaces/([^/]+)/([a-z]+)(?:/([^/]+))?")
TERM = re.compile(r"\s*([^\s=!,]+)\s*(?:(!?=)\s*([^,\s]+)|in\s*\(([^)]*)\))\s*(?:,|$)")
KINDS = {
    "pods": "Pod", "configmaps": "ConfigMap", "services": "Service", "persistentvolumeclaims": "PersistentVolumeClaim",
    "networkpolicies": "NetworkPolicy",
}  # fmt: skip


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Whether the labels have what a=b,c!=d,e in (f,g) asks for; other terms are an error."""
    assert TERM.sub("", selector) == "", selector
    for key, sign, one, many in TERM.findall(selector):
        allowed = [one] if sign else [name.strip() for name in many.split(",")]
        if (labels.get(key) in allowed) == (sign == "!="):
            return False
    return True


def merged(old: Object, new: Object) -> Object:
    return {**old, **{key: merged(old.get(key) or {}, value) if isinstance(value, dict) else value for key, value in new.items()}}


def patched(old: Object, steps: list[Object]) -> Object:
    """A JSON patch that adds, replaces or removes members of objects."""
    made = json.loads(json.dumps(old))
    for step in steps:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        at = made
        for part in parents:
            at = at.setdefault(part, {})
        at.pop(last, None)
        if step["op"] != "remove":
            at[last] = step["value"]
    return made


class Kubernetes:
    """`url` is what follows k8s:// in a master.

    image         the folder that is /opt/bigdl_lite in a container
    environment   what the image sets
    """

    def __init__(self, folder: Path, image: Path, environment: dict[str, str]) -> None:
        self.folder, self.image, self.environment = folder, image, environment
        self.objects: dict[tuple[str, str], Object] = {}
        self.events: list[tuple[str, str, Object]] = []  # kind, what happened, the object then
        self.pods: list[Object] = []  # all that were ever made, as they were asked for
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._changed = threading.Condition(threading.RLock())
        self._open = True
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Ends all pods and the server."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._server.shutdown()
        self._server.server_close()

    def log(self, pod: str) -> str:
        return (self.folder / pod / "log").read_text()

    # what the API server does

    def put(self, kind: str, namespace: str, name: str | None, given: Any) -> Object:
        """Makes the object, or changes what there is."""
        with self._changed:
            name = name or given["metadata"]["name"]
            old = self.objects.get((kind, name))
            first = {
                "apiVersion": "v1", "kind": KINDS[kind], "status": {"phase": "Pending"},
                "metadata": {"uid": str(uuid.uuid4()), "namespace": namespace, "creationTimestamp": _now()},
            }  # fmt: skip
            made = patched(old or first, given) if isinstance(given, list) else merged(old or first, given)
            self._say(kind, "MODIFIED" if old else "ADDED", name, made)
        if kind == "pods" and not old:
            self.pods.append(made)
            threading.Thread(target=self._run, args=(made,), daemon=True).start()
        return made

    def find(self, kind: str, name: str | None, labels: str, fields: str = "") -> list[Object]:
        if not name and fields.startswith("metadata.name="):
            name = fields.removeprefix("metadata.name=")
        with self._changed:
            return [found for (other, key), found in self.objects.items()
                    if other == kind and name in (None, key) and selects(labels, found["metadata"].get("labels", {}))]  # fmt: skip

    def remove(self, kind: str, found: list[Object]) -> None:
        for gone in found:
            name = gone["metadata"]["name"]
            if process := self._processes.get(name) if kind == "pods" else None:
                process.terminate()
            with self._changed:
                self.objects.pop((kind, name), None)
                self.events.append((kind, "DELETED", gone))
                self._changed.notify_all()

    def watch(self, kind: str, name: str | None, labels: str, fields: str, seconds: float = 600.0) -> Iterator[Object]:
        """Events from now on, of what the selectors name; ends when the cluster does."""
        if not name and fields.startswith("metadata.name="):
            name = fields.removeprefix("metadata.name=")
        at, until = len(self.events), time.monotonic() + seconds
        while self._open and time.monotonic() < until:
            with self._changed:
                self._changed.wait_for(lambda seen=at: len(self.events) > seen or not self._open, 1.0)
                new, at = self.events[at:], len(self.events)
            for other, happened, found in new:
                meta = found["metadata"]
                if other == kind and name in (None, meta["name"]) and selects(labels, meta.get("labels", {})):
                    yield {"type": happened, "object": found}

    def _say(self, kind: str, happened: str, name: str, made: Object) -> None:
        made["metadata"] = {**made["metadata"], "resourceVersion": str(len(self.events) + 1)}
        self.objects[kind, name] = made
        self.events.append((kind, happened, made))
        self._changed.notify_all()

    # what the kubelet does

    def _run(self, pod: Object) -> None:
        name, spec = pod["metadata"]["name"], pod["spec"]
        container = spec["containers"][0]
        here = self.folder / name
        here.mkdir(parents=True)
        (here / "tmp").mkdir()
        texts = {"/opt/bigdl_lite": str(self.image)}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
        for number, volume in enumerate(spec.get("volumes", ())):
            if volume["name"] not in mounts:
                continue
            place = here / f"volume{number}"
            place.mkdir()
            texts[mounts[volume["name"]]] = str(place)
            if "configMap" in volume:
                for key, text in self._config_map(volume["configMap"]["name"]).items():
                    (place / key).write_text(re.sub(r"[\w-]+\.[\w-]+\.svc\b", "127.0.0.1", text))

        def here_is(text: str) -> str:
            for path, place in texts.items():
                text = text.replace(path, place)
            return text

        fields = {"status.podIP": "127.0.0.1", "metadata.name": name}
        environment = {**self.environment, "TMPDIR": str(here / "tmp")}
        for variable in container.get("env", ()):
            reference = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            environment[variable["name"]] = fields[reference] if reference else here_is(variable.get("value", ""))
        command = [str(self.image / "docker" / "scripts" / "entrypoint.sh"), *map(here_is, container["args"])]
        with (here / "log").open("wb") as out:
            process = subprocess.Popen(command, cwd=here, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._processes[name] = process
        self._status(name, container["name"], "Running", {"running": {"startedAt": _now()}})
        code = process.wait()
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": _now(), "finishedAt": _now()}
        self._status(name, container["name"], "Failed" if code else "Succeeded", {"terminated": ended})

    def _config_map(self, name: str, seconds: float = 60.0) -> dict[str, str]:
        with self._changed:  # spark-submit makes the pod first, as owner of the rest
            assert self._changed.wait_for(lambda: ("configmaps", name) in self.objects, seconds), f"no config map {name}"
            return self.objects["configmaps", name].get("data", {})

    def _status(self, name: str, container: str, phase: str, state: Object) -> None:
        with self._changed:
            if found := self.objects.get(("pods", name)):
                told = [{"name": container, "state": state, "ready": phase == "Running", "restartCount": 0, "image": "", "imageID": ""}]
                status = {"phase": phase, "podIP": "127.0.0.1", "hostIP": "127.0.0.1", "startTime": _now(), "containerStatuses": told}
                self._say("pods", "MODIFIED", name, {**found, "status": status})


class _Handler(BaseHTTPRequestHandler):
    cluster: Kubernetes
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, told: Object) -> None:
        body = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        given = json.loads(self.rfile.read(length)) if length else {}
        asked = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(asked.query).items()}
        labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
        if not (match := PATH.fullmatch(asked.path)) or match[2] not in KINDS:
            return self._answer(404, _failed(404, f"no {asked.path} here"))
        namespace, kind, name = match.groups()
        if self.command in ("POST", "PUT", "PATCH"):
            return self._answer(201 if self.command == "POST" else 200, self.cluster.put(kind, namespace, name, given))
        if query.get("watch") == "true":
            return self._stream(kind, name, labels, fields)
        found = self.cluster.find(kind, name, labels, fields)
        if self.command == "DELETE":
            self.cluster.remove(kind, found)
            return self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
        if name:
            return self._answer(200, found[0]) if found else self._answer(404, _failed(404, f"{kind} {name} not found"))
        listed = {"kind": f"{KINDS[kind]}List", "apiVersion": "v1", "metadata": {"resourceVersion": str(len(self.cluster.events))}}
        return self._answer(200, {**listed, "items": found})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _stream(self, kind: str, name: str | None, labels: str, fields: str) -> None:
        if self.headers.get("Upgrade"):  # the client then asks again without a web socket
            return self._answer(503, _failed(503, "no web sockets here"))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        with contextlib.suppress(OSError):
            for event in self.cluster.watch(kind, name, labels, fields):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                self.wfile.flush()
        self.close_connection = True


def _failed(code: int, message: str) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": "NotFound"}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
