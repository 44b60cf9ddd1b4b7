"""The page's server: plain values in and out, every name looked up (`workspace`), every request guarded (`guard`).

Ending it hurts no run: what trains are processes of their own (`jobs`), found again by whoever starts the page next.
"""

import asyncio
import re
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from fulcrum.config import parsing
from fulcrum.config.settings import settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import FulcrumError, StoreError
from fulcrum.report.certificate_page import REPORT
from fulcrum.report.run_kinds import Kinds
from fulcrum.web import runs as run_views
from fulcrum.web import workspace
from fulcrum.web.chat import Talks
from fulcrum.web.security import SHOWN_POLICY, App, Guard
from fulcrum.web.workspace import Run, Workspace

_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FIELD = re.compile(
    rf"{re.escape(workspace.YAML)}(?::(\d+):\d+)?: (?:unknown setting '([\w.\[\]]+)'|([a-z_]+(?:[\w.\[\]])*):)?"
)
_PIECE = 2**20  # bytes of a file that are read at once
Id = Annotated[str, InPath(pattern=r"^[0-9a-f]{12}$")]
Name = Annotated[str, InPath(pattern=r"^[a-z][a-z0-9_-]{0,80}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewRun(_Body):
    """A run on uploaded data."""

    data: str = Field(pattern=r"^[0-9a-f]{12}$")
    model: str = Field(min_length=1, max_length=300)


class Columns(_Body):
    """Our names of columns, each with the file's."""

    columns: dict[str, Annotated[str, Field(min_length=1, max_length=200)]]


class Changed(_Body):
    """Settings: as text, or as `a.b: value`."""

    text: str | None = Field(None, max_length=200_000)
    changes: dict[str, Any] = Field(default_factory=dict)


class Begun(_Body):
    """How a run is begun."""

    verb: Literal["train", "compare", "quick"]
    minutes: int | None = Field(None, ge=1, le=100_000)


class Shipped(_Body):
    """What is exported."""

    to: str
    arm: str
    quantization: str = "q8_0"


class Turn(_Body):
    """One turn of a chat."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=20_000)


class Asked(_Body):
    """A question to one model of a run, after what was said."""

    model: str = Field(min_length=1, max_length=100)
    messages: list[Turn] = Field(min_length=1, max_length=100)


def make_app(space: Workspace, talks: Talks, kinds: Kinds) -> FastAPI:
    """Make the application, unguarded; it shows results of these `kinds` of runs."""

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                await asyncio.sleep(30)
                await asyncio.to_thread(talks.end_if_idle)

        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await asyncio.to_thread(talks.end)

    app = FastAPI(lifespan=alive, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(FulcrumError, _refused)
    app.add_exception_handler(RequestValidationError, _unreadable)
    _static(app)
    _data(app, space)
    _settings(app, space, talks)
    _running(app, space)
    _results(app, space, kinds)
    _chat(app, space, talks)
    return app


def guarded(space: Workspace, port: int, told: Callable[[str], None], kinds: Kinds) -> App:
    """Make the whole server for a port; `told` is given each address to open."""
    return Guard(make_app(space, Talks(space), kinds), port, workspace.MOST_BYTES, told)


async def _refused(request: Request, error: Exception) -> Response:
    text = str(error)
    found = _FIELD.match(text)
    line, unknown, field = found.groups() if found else (None, None, None)
    where = {"line": int(line)} if line else {"field": unknown or field} if unknown or field else {}
    status = 404 if isinstance(error, StoreError) and text.startswith("no such") else 400
    return JSONResponse({"error": text.removeprefix(f"{workspace.YAML}: "), **where}, status)


async def _unreadable(request: Request, error: Exception) -> Response:
    first = (
        error.errors()[0]
        if isinstance(error, RequestValidationError)
        else {"loc": (), "msg": str(error)}
    )
    if first["loc"][:1] == ("path",):
        return JSONResponse({"error": "no such thing here"}, 404)
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 422)


def _static(app: FastAPI) -> None:
    folder = resources.files("fulcrum.web") / "static"
    files = {
        item.name: item.read_bytes()
        for item in folder.iterdir()
        if Path(item.name).suffix in _KINDS
    }
    files["style.css"] = (
        resources.files("fulcrum.report") / "templates" / "style.css"
    ).read_bytes()  # the reports'

    @app.get("/")
    def index() -> Response:
        return Response(files["index.html"], media_type="text/html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            return JSONResponse({"error": "no such file"}, 404)
        return Response(files[name], media_type=_KINDS[Path(name).suffix])


def _data(app: FastAPI, space: Workspace) -> None:
    @app.get("/api/start")
    def start() -> Any:
        from fulcrum.model import registry
        from fulcrum.stats import metrics

        return {
            "models": [*space.models, *registry.BUILTIN], "metrics": list(metrics.HAS_OUTCOMES), "folder": str(space.folder),
            "data": store.plain(space.data()), "packaged": workspace.PACKAGED, "most": workspace.MOST_BYTES,
        }  # fmt: skip

    @app.post("/api/data")
    async def upload(
        request: Request, name: Annotated[str, Query(min_length=1, max_length=500)]
    ) -> Any:
        with tempfile.TemporaryFile() as spool:
            async for part in request.stream():
                spool.write(part)
            spool.seek(0)
            return store.plain(
                await asyncio.to_thread(space.add_data, name, iter(lambda: spool.read(_PIECE), b""))
            )

    @app.get("/api/runs")
    def all_runs() -> Any:
        return [_worded(space, run_views.summarize(run)) for run in space.runs()]

    @app.post("/api/runs")
    def new(body: NewRun) -> Any:
        data, model = space.datum(body.data), space.model(body.model)
        run = space.new_run(Path(data.name).stem, data)
        run_views.start_init(space, run, model)
        return run_views.summarize(run)

    @app.post("/api/runs/{run_id}/init")
    def init(run_id: Id, body: Columns) -> Any:
        run_views.start_init(space, space.run(run_id), None, body.columns)
        return _told(space, run_id, run_views.INIT)

    @app.post("/api/runs/{run_id}/again")
    def again(run_id: Id) -> Any:
        return run_views.summarize(space.again(space.run(run_id)))


def _settings(app: FastAPI, space: Workspace, talks: Talks) -> None:
    @app.get("/api/runs/{run_id}")
    def run(run_id: Id) -> Any:
        found = space.run(run_id)
        run_views.settle(space, found)
        return {
            **run_views.summarize(found),
            "changeable": run_views.can_change(found),
            "data_id": found.data,
            **_written(space, found),
        }

    @app.delete("/api/runs/{run_id}")
    def remove(run_id: Id) -> Any:
        found = space.run(run_id)
        run_views.remove(space, found)
        talks.end(found)
        return {"removed": found.title}

    @app.put("/api/runs/{run_id}/settings")
    def change(run_id: Id, body: Changed) -> Any:
        found = space.run(run_id)
        if not run_views.can_change(found):
            raise StoreError(
                "this run was begun: its settings stand; make another with the same settings"
            )
        if body.text is not None:
            space.save(found, body.text)
        else:
            space.change(found, body.changes)
        return _written(space, found)

    @app.post("/api/runs/{run_id}/jobs/{name}")
    def look(run_id: Id, name: Name) -> Any:
        run_views.start_look(space, space.run(run_id), name)
        return _told(space, run_id, name)

    @app.get("/api/runs/{run_id}/jobs/{name}")
    def told(run_id: Id, name: Name) -> Any:
        return _told(space, run_id, name)

    @app.delete("/api/runs/{run_id}/jobs/{name}")
    def end(run_id: Id, name: Name) -> Any:
        return run_views.stop_job(space.run(run_id), name)


def _told(space: Workspace, run_id: str, name: str) -> dict[str, Any]:
    return _worded(space, run_views.read_job(space.run(run_id), name))


def _worded(space: Workspace, found: dict[str, Any]) -> dict[str, Any]:
    """What is told of a command, with files called as the user called them."""
    return {
        **found,
        "why": space.in_words(found["why"]),
        "log": [space.in_words(line) for line in found.get("log", ())],
    }


def _written(space: Workspace, run: Run) -> dict[str, Any]:
    """A run's settings: the text, and of an own run's its values."""
    if not run.settings.exists():
        return {"text": None, "values": None}
    text = space.text(run)
    if not run.is_own:
        return {"text": text, "values": None}
    values = settings_from_dict(
        parsing.parse(text, workspace.YAML), workspace.YAML
    )  # shown, whatever they name
    return {"text": text, "values": values.model_dump(mode="json")}


def _running(app: FastAPI, space: Workspace) -> None:
    @app.post("/api/runs/{run_id}/begin")
    def begin(run_id: Id, body: Begun) -> Any:
        run_views.begin(space, space.run(run_id), body.verb, body.minutes)
        return run_views.summarize(space.run(run_id))

    @app.post("/api/runs/{run_id}/stop")
    def stop(run_id: Id) -> Any:
        run_views.stop(space.run(run_id))
        return run_views.summarize(space.run(run_id))

    @app.post("/api/runs/{run_id}/resume")
    def resume(run_id: Id) -> Any:
        run_views.resume(space, space.run(run_id))
        return run_views.summarize(space.run(run_id))

    @app.get("/api/runs/{run_id}/watch")
    def watch(run_id: Id, after: Annotated[int, Query(ge=0)] = 0) -> Any:
        return _worded(space, run_views.follow(space.run(run_id), after))


def _results(app: FastAPI, space: Workspace, kinds: Kinds) -> None:
    @app.get("/api/runs/{run_id}/result")
    def result(run_id: Id) -> Any:
        return run_views.read_result(space.run(run_id), kinds)

    @app.get("/runs/{run_id}/report")
    def report(run_id: Id) -> Response:
        return _file(
            space.run(run_id).folder / REPORT,
            "text/html",
            {"content-security-policy": SHOWN_POLICY},
        )

    @app.get("/runs/{run_id}/certificate.json")
    def certificate(run_id: Id) -> Response:
        from fulcrum.report import certificate_page

        folder = space.run(run_id).folder
        name = next(iter(certificate_page.find(folder)), "certificate.json")
        return _file(
            folder / name,
            "application/json",
            {"content-disposition": 'attachment; filename="certificate.json"'},
        )

    @app.get("/api/runs/{run_id}/exports")
    def exports(run_id: Id) -> Any:
        return run_views.list_exports(space.run(run_id))

    @app.post("/api/runs/{run_id}/exports")
    def ship(run_id: Id, body: Shipped) -> Any:
        return {
            "name": run_views.export(space, space.run(run_id), body.to, body.arm, body.quantization)
        }

    @app.get("/runs/{run_id}/exports/{name}.zip")
    def download(run_id: Id, name: Name) -> Response:
        folder = run_views.export_folder(space.run(run_id), name)
        if not (folder / "export.json").is_file():
            raise StoreError("no such export here")
        headers = {"content-disposition": f'attachment; filename="{name}.zip"'}
        return StreamingResponse(_zipped(folder), media_type="application/zip", headers=headers)


def _file(path: Path, kind: str, headers: dict[str, str]) -> Response:
    if not path.is_file():
        raise StoreError("no such file in this run as yet")
    return FileResponse(path, media_type=kind, headers=headers)


class _Drain:
    """A file that is only written: what was, is taken away at once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Nothing is held back."""

    def taken(self) -> bytes:
        found = b"".join(self.parts)
        self.parts.clear()
        return found


def _zipped(folder: Path) -> Iterator[bytes]:
    """A folder as a zip archive, uncompressed, piece by piece: weights do not become smaller, and may exceed the memory."""
    drain = _Drain()
    file: Any = drain
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for item in run_views.list_files(folder):
            with (
                archive.open(item["name"], "w", force_zip64=True) as target,
                (folder / item["name"]).open("rb") as stream,
            ):
                while block := stream.read(_PIECE):
                    target.write(block)
                    yield drain.taken()
    yield drain.taken()


def _chat(app: FastAPI, space: Workspace, talks: Talks) -> None:
    @app.get("/api/runs/{run_id}/chat")
    def state(run_id: Id) -> Any:
        return talks.state(space.run(run_id))

    @app.post("/api/runs/{run_id}/chat")
    def begin(run_id: Id) -> Any:
        talks.begin(space.run(run_id))
        return talks.state(space.run(run_id))

    @app.delete("/api/runs/{run_id}/chat")
    def end(run_id: Id) -> Any:
        found = space.run(run_id)
        talks.end(found)
        return talks.state(found)

    @app.post("/api/runs/{run_id}/chat/ask")
    def ask(run_id: Id, body: Asked) -> Response:
        pieces = talks.ask(
            space.run(run_id), body.model, [turn.model_dump() for turn in body.messages]
        )
        return StreamingResponse(pieces, media_type="text/event-stream")


def serve(app: App, listening: Any) -> None:
    """Answer requests on a socket until Ctrl-C or SIGTERM."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])
