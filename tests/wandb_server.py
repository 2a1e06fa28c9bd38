"""As much of a W&B server as a run, `wandb sync` and the dashboard talk to, on a port of this
machine: it stores what arrives.

Histories are kept as W&B keeps them: a file stream says at which line its rows begin, and what was
there is overwritten."""

import contextlib
import gzip
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class StoredRun:
    """What the server knows of a run."""

    def __init__(self) -> None:
        self.fields: dict[
            str, Any
        ] = {}  # of the last upsert: displayName, groupName, jobType, tags, config
        self.history: list[str] = []  # a JSON object a line
        self.summary: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history]

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.fields["config"]).items()}


class Server(ThreadingHTTPServer):
    """Listens while its context is open, where the server `before` it did, and knows the runs of
    that one.

    asked    the GraphQL operations with their variables, oldest first
    views    the workspaces and reports that were saved
    """

    daemon_threads = True

    def __init__(self, before: "Server | None" = None) -> None:
        super().__init__(("127.0.0.1", before.server_port if before else 0), Handler)
        self.runs: dict[str, StoredRun] = before.runs if before else {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.projects: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this server, and to try again every second where it went
        away."""
        waits = {
            f"WANDB__{what}_RETRY_WAIT_{end}_SECONDS": "1"
            for what in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")
            for end in ("MIN", "MAX")
        }
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40, **waits}

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error."""

    def __exit__(self, *_: object) -> None:
        """Goes away, and cuts every connection."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation; an operation that nobody needs an answer to gets
        none."""
        if operation == "UpsertBucket":
            run = self.runs.setdefault(asked["name"], StoredRun())
            run.fields |= {key: value for key, value in asked.items() if value is not None}
            project = {
                "id": "cHJv",
                "name": asked.get("project") or "p",
                "entity": {"id": "ZW50", "name": asked.get("entity") or "local"},
            }
            bucket = {
                "id": "cnVu",
                "name": asked["name"],
                "displayName": run.fields.get("displayName"),
                "description": None,
                "config": run.fields.get("config"),
                "sweepName": None,
                "project": project,
                "historyLineCount": len(run.history),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            return {
                "model": {
                    "id": "cHJv",
                    "name": asked["project"],
                    "entity": {"id": "ZW50", "name": "local"},
                    "bucket": self.resumed(asked["name"]),
                }
            }
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{self.url}/store/{asked['run']}/{name}"}
                for name in asked["files"]
            ]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        if operation in ("Viewer", "GetDefaultEntity"):
            viewer = {
                "id": "dQ==",
                "entity": "local",
                "username": "local",
                "email": "l@l",
                "admin": False,
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer}
        if operation in ("ServerInfo", "ServerFeaturesQuery"):
            return {
                "serverInfo": {
                    "cliVersionInfo": None,
                    "latestLocalVersionInfo": None,
                    "features": [],
                },
                "viewer": {"id": "dQ=="},
            }
        if operation == "CreateArtifact":
            return {
                "createArtifact": {
                    "artifact": {
                        "id": "YXJ0",
                        "state": "COMMITTED",
                        "artifactSequence": {"latestArtifact": {"id": "YXJ0"}},
                    }
                }
            }
        if operation == "GetProjects":
            edges = [
                {
                    "node": {
                        "id": "cHJv",
                        "name": name,
                        "entityName": asked["entity"],
                        "createdAt": "2026-01-01T00:00:00",
                        "isBenchmark": False,
                    },
                    "cursor": "c",
                }
                for name in self.projects
            ]
            return {
                "models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": edges}
            }
        if operation == "CreateProject":
            self.projects.append(asked["input"]["name"])
            return {"result": {"project": None, "model": None, "inserted": True}}
        if operation in ("UpsertView2", "upsertView"):
            self.views.append(asked)
            project = {
                "id": "cHJv",
                "name": asked["projectName"],
                "entityName": asked["entityName"],
            }
            view = {
                key: asked[key] for key in ("name", "displayName", "description", "type", "spec")
            }
            return {
                "upsertView": {
                    "view": {
                        "id": "dmll",
                        "project": project,
                        "updatedAt": "2026-01-01T00:00:00",
                        **view,
                    },
                    "inserted": True,
                }
            }
        return {}

    def resumed(self, name: str) -> dict[str, Any] | None:
        """What a run that goes on must know of its past."""
        if name not in self.runs:
            return None
        run = self.runs[name]
        tail = json.dumps(run.history[-1:])
        return {
            "id": "cnVu",
            "name": name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": run.fields.get("config"),
            "tags": run.fields.get("tags", []),
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }

    def stream(self, name: str, chunk: dict[str, Any]) -> None:
        """Stores what a run's file stream brings."""
        run = self.runs[name]
        for file, part in (chunk.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.history[part["offset"] : part["offset"] + len(part["content"])] = part[
                    "content"
                ]
            elif file == "wandb-summary.json":
                run.summary |= json.loads(part["content"][-1])
        if chunk.get("complete"):
            run.exit_code = chunk["exitcode"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return (
            gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content
        )

    def reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        self.server.runs[run].files[name] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        body = self.body()
        if "file_stream" in self.path:
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self.reply({"exitcode": None, "limits": {}})
            return
        if self.path != "/graphql":
            self.close_connection = True
            return self.reply({})
        content = json.loads(body)
        match = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])
        operation, asked = match[1] if match else "", content.get("variables") or {}
        self.server.asked.append((operation, asked))
        self.reply({"data": self.server.answer(operation, asked)})
