"""The page's server: plain values in and out, names looked up (`workspace`), requests guarded.

Ending it stops no run: trainings are processes of their own (`jobs`), found again by the next
server.
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
# The place in settings that an error is about: a line, an unknown setting, or a setting.
_FIELD = re.compile(
    rf"{re.escape(workspace.YAML)}(?::(\d+):\d+)?: "
    r"(?:unknown setting '([\w.\[\]]+)'|([a-z_]+(?:[\w.\[\]])*):)?"
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
    """The file's name of each column, by ours."""

    columns: dict[str, Annotated[str, Field(min_length=1, max_length=200)]]


class SettingsChange(_Body):
    """Settings: as text, or as `a.b: value`."""

    text: str | None = Field(None, max_length=200_000)
    changes: dict[str, Any] = Field(default_factory=dict)


class RunStart(_Body):
    """How to begin a run."""

    verb: Literal["train", "compare", "quick"]
    minutes: int | None = Field(None, ge=1, le=100_000)


class ExportRequest(_Body):
    """What to export."""

    to: str
    arm: str
    quantization: str = "q8_0"


class Turn(_Body):
    """One turn of a chat."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=20_000)


class ChatQuestion(_Body):
    """A question to one model of a run, after what was said."""

    model: str = Field(min_length=1, max_length=100)
    messages: list[Turn] = Field(min_length=1, max_length=100)


def make_app(space: Workspace, talks: Talks, kinds: Kinds) -> FastAPI:
    """Make the application, unguarded; it shows results of these `kinds` of runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def end_idle_chats() -> None:
            while True:
                await asyncio.sleep(30)
                await asyncio.to_thread(talks.end_if_idle)

        watching = asyncio.create_task(end_idle_chats())
        yield
        watching.cancel()
        await asyncio.to_thread(talks.end)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(FulcrumError, _refused)
    app.add_exception_handler(RequestValidationError, _unreadable)
    _add_static(app)
    _add_data(app, space)
    _add_runs(app, space)
    _add_settings(app, space, talks)
    _add_jobs(app, space)
    _add_running(app, space)
    _add_results(app, space, kinds)
    _add_chat(app, space, talks)
    return app


def guarded(space: Workspace, port: int, show: Callable[[str], None], kinds: Kinds) -> App:
    """Make the whole server for a port; `show` is called with each address to open."""
    return Guard(make_app(space, Talks(space), kinds), port, workspace.MOST_BYTES, show)


async def _refused(request: Request, error: Exception) -> Response:
    text = str(error)
    body: dict[str, Any] = {"error": text.removeprefix(f"{workspace.YAML}: ")}
    match = _FIELD.match(text)
    if match:
        line, unknown, field = match.groups()
        if line:
            body["line"] = int(line)
        elif unknown or field:
            body["field"] = unknown or field
    status = 404 if isinstance(error, StoreError) and text.startswith("no such") else 400
    return JSONResponse(body, status)


async def _unreadable(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        return JSONResponse({"error": str(error)}, 422)
    first = error.errors()[0]
    if first["loc"][:1] == ("path",):
        return JSONResponse({"error": "no such thing here"}, 404)
    place = ".".join(map(str, first["loc"][1:]))
    return JSONResponse({"error": f"{place}: {first['msg']}"}, 422)


def _add_static(app: FastAPI) -> None:
    folder = resources.files("fulcrum.web") / "static"
    files = {}
    for item in folder.iterdir():
        if Path(item.name).suffix in _KINDS:
            files[item.name] = item.read_bytes()
    style = resources.files("fulcrum.report") / "templates" / "style.css"
    files["style.css"] = style.read_bytes()  # the reports'

    @app.get("/")
    def index() -> Response:
        return Response(files["index.html"], media_type="text/html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            return JSONResponse({"error": "no such file"}, 404)
        return Response(files[name], media_type=_KINDS[Path(name).suffix])


def _add_data(app: FastAPI, space: Workspace) -> None:
    @app.get("/api/start")
    def start() -> Any:
        from fulcrum.model import registry
        from fulcrum.stats import metrics

        return {
            "models": [*space.models, *registry.BUILTIN],
            "metrics": list(metrics.HAS_OUTCOMES),
            "folder": str(space.folder),
            "data": store.plain(space.data()),
            "packaged": workspace.PACKAGED,
            "most": workspace.MOST_BYTES,
        }

    @app.post("/api/data")
    async def upload(
        request: Request, name: Annotated[str, Query(min_length=1, max_length=500)]
    ) -> Any:
        with tempfile.TemporaryFile() as spool:
            async for part in request.stream():
                spool.write(part)
            spool.seek(0)
            parts = iter(lambda: spool.read(_PIECE), b"")
            return store.plain(await asyncio.to_thread(space.add_data, name, parts))


def _add_runs(app: FastAPI, space: Workspace) -> None:
    @app.get("/api/runs")
    def all_runs() -> Any:
        return [_name_data(space, run_views.summarize(run)) for run in space.runs()]

    @app.post("/api/runs")
    def new(body: NewRun) -> Any:
        data = space.datum(body.data)
        model = space.model(body.model)
        run = space.new_run(Path(data.name).stem, data)
        run_views.start_init(space, run, model)
        return run_views.summarize(run)

    @app.post("/api/runs/{run_id}/init")
    def init(run_id: Id, body: Columns) -> Any:
        run_views.start_init(space, space.run(run_id), None, body.columns)
        return _read_job(space, run_id, run_views.INIT)

    @app.post("/api/runs/{run_id}/again")
    def again(run_id: Id) -> Any:
        return run_views.summarize(space.again(space.run(run_id)))


def _add_settings(app: FastAPI, space: Workspace, talks: Talks) -> None:
    @app.get("/api/runs/{run_id}")
    def show(run_id: Id) -> Any:
        run = space.run(run_id)
        run_views.settle(space, run)
        return {
            **run_views.summarize(run),
            "changeable": run_views.can_change(run),
            "data_id": run.data,
            **_read_settings(space, run),
        }

    @app.delete("/api/runs/{run_id}")
    def remove(run_id: Id) -> Any:
        run = space.run(run_id)
        run_views.remove(space, run)
        talks.end(run)
        return {"removed": run.title}

    @app.put("/api/runs/{run_id}/settings")
    def change(run_id: Id, body: SettingsChange) -> Any:
        run = space.run(run_id)
        if not run_views.can_change(run):
            raise StoreError(
                "this run was begun: its settings stand; make another with the same settings"
            )
        if body.text is not None:
            space.save(run, body.text)
        else:
            space.change(run, body.changes)
        return _read_settings(space, run)


def _add_jobs(app: FastAPI, space: Workspace) -> None:
    @app.post("/api/runs/{run_id}/jobs/{name}")
    def look(run_id: Id, name: Name) -> Any:
        run_views.start_look(space, space.run(run_id), name)
        return _read_job(space, run_id, name)

    @app.get("/api/runs/{run_id}/jobs/{name}")
    def state(run_id: Id, name: Name) -> Any:
        return _read_job(space, run_id, name)

    @app.delete("/api/runs/{run_id}/jobs/{name}")
    def end(run_id: Id, name: Name) -> Any:
        return run_views.stop_job(space.run(run_id), name)


def _read_job(space: Workspace, run_id: str, name: str) -> dict[str, Any]:
    return _name_data(space, run_views.read_job(space.run(run_id), name))


def _name_data(space: Workspace, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a command, with uploaded files called as the user called them."""
    return {
        **state,
        "why": space.in_words(state["why"]),
        "log": [space.in_words(line) for line in state.get("log", ())],
    }


def _read_settings(space: Workspace, run: Run) -> dict[str, Any]:
    """Return a run's settings: the text, and for a run that the page made its values."""
    if not run.settings.exists():
        return {"text": None, "values": None}
    text = space.text(run)
    if not run.is_own:
        return {"text": text, "values": None}
    # Shown even if they name what the page may not use, so not looked up.
    values = settings_from_dict(parsing.parse(text, workspace.YAML), workspace.YAML)
    return {"text": text, "values": values.model_dump(mode="json")}


def _add_running(app: FastAPI, space: Workspace) -> None:
    @app.post("/api/runs/{run_id}/begin")
    def begin(run_id: Id, body: RunStart) -> Any:
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
        return _name_data(space, run_views.follow(space.run(run_id), after))


def _add_results(app: FastAPI, space: Workspace, kinds: Kinds) -> None:
    @app.get("/api/runs/{run_id}/result")
    def result(run_id: Id) -> Any:
        return run_views.read_result(space.run(run_id), kinds)

    @app.get("/runs/{run_id}/report")
    def report(run_id: Id) -> Response:
        headers = {"content-security-policy": SHOWN_POLICY}
        return _file(space.run(run_id).folder / REPORT, "text/html", headers)

    @app.get("/runs/{run_id}/certificate.json")
    def certificate(run_id: Id) -> Response:
        from fulcrum.report import certificate_page

        folder = space.run(run_id).folder
        name = next(iter(certificate_page.find(folder)), "certificate.json")
        headers = {"content-disposition": 'attachment; filename="certificate.json"'}
        return _file(folder / name, "application/json", headers)

    @app.get("/api/runs/{run_id}/exports")
    def exports(run_id: Id) -> Any:
        return run_views.list_exports(space.run(run_id))

    @app.post("/api/runs/{run_id}/exports")
    def export(run_id: Id, body: ExportRequest) -> Any:
        run = space.run(run_id)
        return {"name": run_views.export(space, run, body.to, body.arm, body.quantization)}

    @app.get("/runs/{run_id}/exports/{name}.zip")
    def download(run_id: Id, name: Name) -> Response:
        folder = run_views.export_folder(space.run(run_id), name)
        if not (folder / "export.json").is_file():
            raise StoreError("no such export here")
        headers = {"content-disposition": f'attachment; filename="{name}.zip"'}
        return StreamingResponse(_zip(folder), media_type="application/zip", headers=headers)


def _file(path: Path, kind: str, headers: dict[str, str]) -> Response:
    if not path.is_file():
        raise StoreError("no such file in this run as yet")
    return FileResponse(path, media_type=kind, headers=headers)


class _Drain:
    """A file that is only written, whose content is taken out again at once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def take(self) -> bytes:
        content = b"".join(self.parts)
        self.parts.clear()
        return content


def _zip(folder: Path) -> Iterator[bytes]:
    """Yield a folder as a zip archive, piece by piece, since weights may exceed the memory.

    It is uncompressed: weights do not become smaller.
    """
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
                    yield drain.take()
    yield drain.take()


def _add_chat(app: FastAPI, space: Workspace, talks: Talks) -> None:
    @app.get("/api/runs/{run_id}/chat")
    def state(run_id: Id) -> Any:
        return talks.state(space.run(run_id))

    @app.post("/api/runs/{run_id}/chat")
    def begin(run_id: Id) -> Any:
        talks.begin(space.run(run_id))
        return talks.state(space.run(run_id))

    @app.delete("/api/runs/{run_id}/chat")
    def end(run_id: Id) -> Any:
        run = space.run(run_id)
        talks.end(run)
        return talks.state(run)

    @app.post("/api/runs/{run_id}/chat/ask")
    def ask(run_id: Id, body: ChatQuestion) -> Response:
        messages = [turn.model_dump() for turn in body.messages]
        pieces = talks.ask(space.run(run_id), body.model, messages)
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
