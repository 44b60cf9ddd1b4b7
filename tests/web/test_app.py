"""The page's server: who may ask, what may be named, what becomes of runs when it ends.

The page: e2e/test_page.py.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulcrum.config.arms import own_arm
from fulcrum.config.settings import settings_from_dict
from fulcrum.core import run_folder, store
from fulcrum.core.errors import ConfigError, DataError, StoreError
from fulcrum.data import run_data
from fulcrum.deploy import export
from fulcrum.experiments import budget
from fulcrum.experiments.arm_data import resolve
from fulcrum.experiments.units import Speed
from fulcrum.web import app as web_app
from fulcrum.web import chat, jobs, runs, security, workspace
from fulcrum.web.jobs import Job
from fulcrum.web.workspace import Run, Workspace
from helpers.commands import done
from helpers.page_server import STANDING_IN, Client, served, until
from helpers.tiny import comparison_settings, save_task, tiny_tokenizer

ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    (tmp_path / "model").mkdir()
    return Workspace(tmp_path / "space", models=[tmp_path / "model"])


@pytest.fixture
def run(space: Workspace) -> Run:
    """A run with settings, as `init` leaves it."""
    found = space.new_run("tickets", space.add_data("tickets.jsonl", [ROWS]))
    data = {
        "model": space.models[0],
        "task": {"train": space.data()[0].path, "anchor": "Sort it."},
        "general": "builtin",
    }
    space.write(found, data)
    return found


@pytest.fixture
def client(space: Workspace) -> Iterator[Client]:
    with served(space) as (client, _):
        yield client


# ---- who may ask


def test_an_address_lets_in_one_browser_once(space: Workspace) -> None:
    with served(space) as (client, told):
        path = told[0].partition(str(client.port))[2]
        assert len(told) == 2  # the client of this test took the first
        status, body, headers = client.ask("GET", path)
        assert (
            status,
            "was opened before" in json.loads(body)["error"],
            "set-cookie" in headers,
        ) == (403, True, False)
        status, _, headers = client.ask("GET", told[1].partition(str(client.port))[2])
        assert (status, headers["location"]) == (303, "/")
        assert re.fullmatch(
            rf"fulcrum_{client.port}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Strict",
            headers["set-cookie"],
        )
        assert client.ask("GET", "/api/start")[0] == 200
    with served(space) as (other, _):
        other.cookie = client.cookie
        assert other.ask("GET", "/api/start")[0] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/api/start",
        "/api/runs",
        "/runs/0123456789ab/report",
        "/runs/0123456789ab/exports/export-x-gguf.zip",
    ],
)
@pytest.mark.parametrize("cookie", [None, "", "fulcrum=x", "fulcrum_0=%s"])
def test_nothing_is_told_without_the_cookie(client: Client, path: str, cookie: str | None) -> None:
    assert client.ask("GET", path, Cookie=cookie)[0] == 401
    assert client.ask("GET", "/", Cookie=cookie)[0] == 200  # the empty page, which says so


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        None,
    ],
)
@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/start"])
def test_another_name_of_this_machine_is_not_answered(
    client: Client, host: str | None, path: str
) -> None:
    assert client.ask("GET", path, Host=host and host.format(port=client.port))[0] in (400, 403)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}"},
        {"X-Fulcrum": None},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_no_other_page_can_change_anything(
    client: Client, run: Run, headers: dict[str, str | None]
) -> None:
    given = {name: value and value.format(port=client.port) for name, value in headers.items()}
    for method, path in (
        ("POST", f"/api/runs/{run.id}/begin"),
        ("PUT", f"/api/runs/{run.id}/settings"),
        ("DELETE", f"/api/runs/{run.id}/chat"),
    ):
        assert client.ask(method, path, b"{}", Content_Type="application/json", **given)[0] == 403
    assert not jobs.was_started(run.job("run"))


def test_what_may_be_done_with_an_answer_is_said(client: Client, run: Run) -> None:
    for path in ("/", "/static/app.js", "/api/start", "/api/runs/ffffffffffff"):
        _, _, headers = client.ask("GET", path)
        assert headers["content-security-policy"] == security.POLICY
        assert (headers["x-content-type-options"], headers["cache-control"]) == (
            "nosniff",
            "no-store",
        )
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control")]
    assert "unsafe" not in security.POLICY
    run.folder.mkdir()
    (run.folder / "report.html").write_text("<script>parent.hit = 1</script>")
    assert client.ask("GET", f"/runs/{run.id}/report")[2]["content-security-policy"].startswith(
        "sandbox; default-src 'none';"
    )


def test_the_page_holds_no_script_or_style_of_its_own() -> None:
    folder = Path(web_app.__file__).parent / "static"
    text = (folder / "index.html").read_text()
    assert not re.search(
        r"<style|\son\w+=|style=|<script(?! type=\"module\" src=\"/static/\w+\.js\")", text
    )
    for file in folder.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
            r"|https?://(?!www\.w3\.org)",
            file.read_text(),
        ), file


# ---- what may be named


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/..",
        "/api/runs/../../etc",
        "/api/runs/%2e%2e%2f%2e%2e",
        "/api/runs/0123456789AB",
        "/api/runs/0123456789ab",
        "/api/runs/{id}%00",
        "/api/runs/{id}/jobs/..%2frun",
        "/api/runs/{id}/jobs/run",
        "/runs/{id}/exports/..%2fout.zip",
        "/runs/{id}/exports/export-..-gguf.zip",
        "/runs/{id}/exports/export-tell-gguf.zip",
        "/runs/{id}/report",
        "/static/..%2fstyle.css",
        "/static/../web.py",
        "/static/%2fetc%2fpasswd",
        "/docs",
        "/openapi.json",
        "/data/",
        "/runs/{id}/run.yaml",
    ],
)
def test_what_is_not_looked_up_is_not_there(client: Client, run: Run, path: str) -> None:
    status, body, _ = client.ask("GET", path.format(id=run.id))
    assert status == 404
    assert b"root:" not in body


def test_only_uploaded_files_become_runs(client: Client) -> None:
    for asked in ("../../etc/passwd", "/etc/passwd", "ABCDEFABCDEF", "0123456789ab"):
        answer = client.refused(
            "POST", "/api/runs", {"data": asked, "model": "smollm2-135m-instruct"}
        )
        assert answer["status"] in (400, 422)
    assert client.json("GET", "/api/runs") == []


@pytest.mark.parametrize(
    ("dotted", "value", "named"),
    [
        ("task.train", "/etc/passwd", "task.train"),
        ("task.train", "../../secret.jsonl", "task.train"),
        ("task.test", "*.jsonl", "task.test"),
        ("task.dev", "data", "task.dev"),
        ("task.unlabeled", "~/x.csv", "task.unlabeled"),
        ("general", "/etc", "general"),
        ("general", "data/0123456789ab.jsonl", "general"),
        ("general", "runs/x", "general"),
        ("general", "http://x.example/a", "general"),
        (
            "compare.arms",
            [{"name": "own", "general": "pool", "pool": "/etc/passwd"}],
            "compare.arms",
        ),
        ("model", "/", "model"),
        ("model", "../model", "model"),
        ("model", "runs/x", "model"),
        ("model", "smollm", "model"),
        ("trust_remote_code", True, "trust_remote_code"),
        ("teacher", {"endpoint": "http://x.example/v1", "model": "m"}, "teacher"),
        ("mix.repeats", 0, "mix.repeats"),
        ("mix.repeat", 1, "mix.repeat"),
    ],
)
def test_settings_name_only_what_was_looked_up(
    client: Client, run: Run, dotted: str, value: Any, named: str
) -> None:
    before = run.settings.read_text()
    answer = client.refused("PUT", f"/api/runs/{run.id}/settings", {"changes": {dotted: value}})
    assert (answer["status"], answer["field"]) == (400, named)
    whole = yaml.safe_load(before)
    section, _, last = dotted.rpartition(".")
    (whole.setdefault(section, {}) if section else whole)[last] = value
    assert (
        client.refused("PUT", f"/api/runs/{run.id}/settings", {"text": yaml.safe_dump(whole)})[
            "field"
        ]
        == named
    )
    assert run.settings.read_text() == before


def test_settings_may_name_uploads_hub_ids_and_models_of_the_start(
    client: Client, space: Workspace, run: Run
) -> None:
    own = space.add_data("pool.jsonl", [ROWS]).path
    for dotted, value in (
        ("general", own),
        ("general", "builtin"),
        ("general", "org/some-set"),
        ("model", "org/model.x"),
        ("model", space.models[0]),
        ("task.test", own),
    ):
        client.json("PUT", f"/api/runs/{run.id}/settings", {"changes": {dotted: value}})
    found = client.json("GET", f"/api/runs/{run.id}")
    assert found["values"]["tasks"][0]["test"][0]["path"] == own
    assert settings_from_dict(yaml.safe_load(found["text"])).output_dir == f"runs/{run.id}/out"


def test_where_a_run_is_kept_is_not_the_users_to_choose(space: Workspace, run: Run) -> None:
    space.change(run, {"output_dir": "/tmp"})
    assert f"output_dir: runs/{run.id}/out" in run.settings.read_text()
    with pytest.raises(ConfigError, match=f"this run is kept in runs/{run.id}/out; leave it so"):
        space.save(run, run.settings.read_text().replace(f"runs/{run.id}/out", "elsewhere"))


def test_what_is_no_yaml_is_named_by_its_line(client: Client, run: Run) -> None:
    answer = client.refused(
        "PUT", f"/api/runs/{run.id}/settings", {"text": "model: x\ntask: {train: [}\n"}
    )
    assert (answer["status"], answer["line"]) == (400, 2)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (ROWS, ".jsonl"),
        (b"\xef\xbb\xbf" + ROWS, ".jsonl"),
        (b"[1, 2]", ".json"),
        (b'{\n "rows": []}', ".json"),
        (b"prompt,completion\na,b\n", ".csv"),
        (b"PAR1" + b"x" * 20 + b"PAR1", ".parquet"),
        ("é".encode() * 70_000, ".csv"),
        (b'{"a": "' + b"x" * 200_000 + b'"}\n', ".jsonl"),
    ],
)
def test_a_files_kind_is_what_it_holds(space: Workspace, content: bytes, kind: str) -> None:
    found = space.add_data("../../<b>x</b>\n.exe", [content])
    assert found.path == f"data/{found.id}{kind}"
    assert (space.folder / found.path).read_bytes() == content
    assert space.data() == [found]
    assert found.name == "../../<b>x</b> .exe"  # shown as text, and no part of a path


def test_where_the_content_may_be_several_kinds_the_name_decides(space: Workspace) -> None:
    assert space.add_data("rows.jsonl", [b"# not JSON\n" + ROWS]).path.endswith(".jsonl")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"  \n",
        b"MZ\x90\x00\x03",
        b"\x1f\x8b\x08\x00",
        b"a\0b",
        b"PAR1 and no end"[:4] + b"\xff",
    ],
)
def test_what_holds_no_rows_is_refused_and_leaves_nothing(space: Workspace, content: bytes) -> None:
    with pytest.raises(DataError, match=r"jsonl, \.json, \.csv or \.parquet"):
        space.add_data("x.jsonl", [content])
    assert list((space.folder / "data").iterdir()) == []


def test_too_much_is_refused(
    client: Client, space: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = "/api/data?name=x.jsonl"
    assert client.ask("POST", upload, ROWS * 400)[0] == 413
    assert (
        client.ask(
            "POST",
            upload,
            b"%x\r\n" % len(ROWS) + ROWS + b"\r\n0\r\n\r\n",
            Transfer_Encoding="chunked",
        )[0]
        == 411
    )
    assert (
        client.ask("PUT", f"/api/runs/{run.id}/settings", None, Content_Length=str(2**21))[0] == 413
    )
    assert client.ask("POST", upload, ROWS)[0] == 200
    monkeypatch.setattr(workspace, "MOST_BYTES", 2**20)
    with pytest.raises(DataError, match="more than 1 MiB; give its path to `fulcrum init`"):
        space.add_data("x.jsonl", (ROWS * 1000 for _ in range(100)))
    assert len(space.data()) == 2


# ---- runs are processes of their own


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "COMMAND", STANDING_IN)


def test_a_run_is_begun_found_again_stopped_and_gone_on_with(
    space: Workspace, run: Run, standing_in: None
) -> None:
    with served(space) as (client, _):
        assert (
            client.json("POST", f"/api/runs/{run.id}/begin", {"verb": "train"})["state"]
            == "running"
        )
        until(lambda: jobs.tail(run.job("run")))
        assert (
            "begun already"
            in client.refused("POST", f"/api/runs/{run.id}/begin", {"verb": "train"})["error"]
        )
    with served(Workspace(space.folder)) as (
        client,
        _,
    ):  # the page's server, started anew, and without the model's folder
        (card,) = client.json("GET", "/api/runs")
        assert (card["state"], card["verb"], card["title"]) == ("running", "train", "tickets")
        seen = client.json("GET", f"/api/runs/{run.id}/watch?after=0")
        assert [(point["step"], point["task_loss"]) for point in seen["points"]] == [(1, 2.5)]
        assert client.json("GET", f"/api/runs/{run.id}/watch?after={seen['end']}")["points"] == []
        assert (
            "begun"
            in client.refused("PUT", f"/api/runs/{run.id}/settings", {"changes": {"seed": 1}})[
                "error"
            ]
        )
        client.json("POST", f"/api/runs/{run.id}/stop")
        until(lambda: not jobs.is_running(run.job("run")))
        seen = client.json("GET", f"/api/runs/{run.id}/watch?after=0")
        assert (seen["state"], seen["resumable"]) == ("stopped", True)
        assert seen["why"] == ""  # the page has a button for what the command says to do
        client.json("POST", f"/api/runs/{run.id}/resume")
        until(lambda: not jobs.is_running(run.job("run")))
        assert client.json("GET", f"/api/runs/{run.id}/watch?after=0")["state"] == "finished"
        assert (
            "nothing to go on with" in client.refused("POST", f"/api/runs/{run.id}/resume")["error"]
        )
        assert client.json("GET", f"/api/runs/{run.id}")["values"]["model"] == space.models[0]
        assert client.refused("POST", f"/api/runs/{run.id}/again")["field"] == "model"
        assert len(client.json("GET", "/api/runs")) == 1  # no run without settings is left of it
    with served(space) as (client, _):
        again = client.json("POST", f"/api/runs/{run.id}/again")
        assert (again["state"], again["title"], again["set"]) == (
            "planned",
            "tickets (again)",
            True,
        )


@pytest.mark.e2e
def test_a_killed_server_hurts_no_run(
    space: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server, killed with SIGKILL and all of its process group; another finds the run and
    stops it."""
    code = (
        f"from fulcrum.web import jobs; jobs.COMMAND = {STANDING_IN!r}; from fulcrum.cli.main "
        "import main; main()"
    )
    words = [
        "ui",
        "--folder",
        str(space.folder),
        "--model",
        space.models[0],
        "--port",
        "0",
        "--no-browser",
    ]
    server = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    address = re.fullmatch(
        r"page: http://127\.0\.0\.1:(\d+)(/\?token=[\w-]+)\n", server.stdout.readline()
    )
    assert address is not None
    client = Client(int(address[1]))
    client.cookie = client.ask("GET", address[2])[2]["set-cookie"].partition(";")[0]
    assert client.json("POST", f"/api/runs/{run.id}/begin", {"verb": "train"})["state"] == "running"
    until(lambda: jobs.tail(run.job("run")) == ["at work"])
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server.stdout.close()
    assert runs.find_state(run) == ("running", "")
    runs.stop(run)
    until(lambda: not jobs.is_running(run.job("run")))
    assert runs.find_state(run)[0] == "stopped"


def test_a_process_of_the_same_number_is_not_the_jobs(tmp_path: Path) -> None:
    job = Job(tmp_path, "run")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = jobs.began(other.pid)
        assert began is not None
        assert jobs.lives(other.pid, began)
        known = {"pid": other.pid, "began": f"{began}0", "host": os.uname().nodename, "words": []}
        job.record.write_text(json.dumps(known))
        assert not jobs.is_running(job)
        jobs.stop(job)
        assert other.poll() is None
    finally:
        other.communicate(b"\n")
    assert jobs.began(other.pid) is None
    for pid in (None, True, 0, -1, "1"):
        assert not jobs.lives(pid, began)


def test_how_a_run_ended_is_said(run: Run) -> None:
    run.job("run").folder.mkdir()
    job = run.job("run")
    job.record.write_text(json.dumps({"pid": 2**30, "began": "0", "words": ["train"]}))
    job.log.write_text("reading data\nerror: x.jsonl: no such file\n")
    assert runs.find_state(run) == ("failed", "x.jsonl: no such file")
    assert runs.can_change(run)  # it made nothing
    job.log.write_text("reading data\n")
    assert runs.find_state(run)[1].startswith("it ended without a word: it was killed")
    job.record.write_text(
        json.dumps({"pid": 2**30, "began": "0", "words": ["train"], "asked": True})
    )
    assert runs.find_state(run)[0] == "stopped"


def test_data_that_could_not_be_read_are_no_run_to_come(run: Run) -> None:
    run.settings.unlink()
    first = run.job("init")
    first.folder.mkdir(exist_ok=True)
    first.record.write_text(json.dumps({"pid": 2**30, "began": "0", "words": ["init"]}))
    first.log.write_text("error: tickets.jsonl: no row format fits\n")
    assert runs.find_state(run) == ("failed", "tickets.jsonl: no row format fits")
    assert not runs.can_resume(run)


def test_who_asks_twice_to_stop_is_obeyed_once(tmp_path: Path) -> None:
    """A second signal would end a training in mid-step."""
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); "
        "print('up', flush=True); "
    )
    job = Job(tmp_path, "run")
    process = subprocess.Popen(
        [sys.executable, "-c", code + "sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    known = {
        "pid": process.pid,
        "began": jobs.began(process.pid),
        "host": os.uname().nodename,
        "words": [],
    }
    job.record.write_text(json.dumps(known))
    jobs.stop(job)
    assert process.stdout.readline() == "asked\n"
    jobs.stop(job)
    assert jobs.was_asked(job)
    assert process.communicate("")[0] == ""
    assert jobs.wait(job, 10)


def test_one_page_at_a_time_works_on_a_folder(space: Workspace) -> None:
    with (
        space.held(),
        pytest.raises(StoreError, match="another page is at work on it"),
        Workspace(space.folder).held(),
    ):
        pass
    with Workspace(space.folder).held():
        pass


def test_changes_at_once_are_all_kept(space: Workspace, run: Run) -> None:
    changes = [
        {"mix.repeats": 2},
        {"seed": 5},
        {"task.max_new_tokens": 7},
        {"mix.general_per_task": 3},
    ]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda one: space.change(run, one), changes))
        found = space.values(run, space.text(run))
        assert (
            found.mix.repeats,
            found.seed,
            found.tasks[0].max_new_tokens,
            found.mix.general_per_task,
        ) == (2, 5, 7, 3)
        space.change(
            run, {"mix.repeats": 1, "seed": 0, "task.max_new_tokens": 4, "mix.general_per_task": 1}
        )


def test_code_of_a_models_own_is_not_run_from_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "run"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(
        "model: a/b\ntrust_remote_code: true\ntask: {train: x.jsonl}\n"
    )
    space = Workspace(tmp_path / "space", runs=[tmp_path / "mine"])
    (found,) = space.runs()
    with pytest.raises(ConfigError, match="trust_remote_code: not from the page"):
        chat.Talks(space).begin(found)


def test_a_log_that_is_half_written_or_begun_anew(run: Run) -> None:
    run.folder.mkdir()
    log = run.folder / "events.jsonl"
    log.write_text('{"step": 1}\n\xff\n{"step": 2}\n{"st')
    first = runs.follow(run, 0)
    assert [point["step"] for point in first["points"]] == [1, 2]
    log.write_text('{"step": 1}\n')
    assert runs.follow(run, first["end"])["end"] == 12


def test_a_removed_run_takes_along_what_nobody_else_names(
    client: Client, space: Workspace, run: Run
) -> None:
    pool = space.add_data("pool.jsonl", [ROWS])
    mine, spare = space.add_data("mine.jsonl", [ROWS]), space.add_data("spare.jsonl", [ROWS])
    space.change(run, {"general": [{"path": pool.path}]})
    other = space.new_run("mine", mine)
    data = {
        "model": space.models[0],
        "task": {"train": mine.path, "test": space.datum(run.data).path},
        "general": "builtin",
    }
    space.write(other, data)
    store.write_json(run.folder / store.MANIFEST, {})
    assert client.json("DELETE", f"/api/runs/{run.id}") == {"removed": "tickets"}
    assert [one["id"] for one in client.json("GET", "/api/runs")] == [other.id]
    assert {one.id for one in space.data()} == {
        run.data,
        mine.id,
        spare.id,
    }  # the other run tests on what this one trained on
    assert not list(space.folder.rglob(f"*{pool.id}*"))
    assert not list(space.folder.rglob(f"*{run.id}*"))
    assert client.refused("DELETE", f"/api/runs/{run.id}")["status"] == 404
    client.json("DELETE", f"/api/runs/{other.id}")
    assert [one.id for one in space.data()] == [spare.id]


def test_uploads_that_a_run_of_the_users_folders_names_stay(
    tmp_path: Path, space: Workspace, run: Run
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"kind": "train"}')
    (folder / "config.yaml").write_text(f"task: {{train: {space.datum(run.data).path}}}\n")
    both = Workspace(space.folder, runs=[folder])
    runs.remove(both, run)
    assert [one.id for one in both.data()] == [run.data]


def test_a_run_that_a_terminal_works_on_is_not_removed(
    client: Client, space: Workspace, run: Run
) -> None:
    with run_folder.held(run.folder):
        told = client.refused("DELETE", f"/api/runs/{run.id}")
    assert f"process {os.getpid()} on " in told["error"]
    assert run.settings.exists()
    assert [one.id for one in space.data()] == [run.data]
    client.json("DELETE", f"/api/runs/{run.id}")
    assert not run.desk.exists()


def test_what_cannot_be_removed_whole_is_said(
    space: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(
        StoreError, match="not all of it could be removed; look who may write there"
    ):
        runs.remove(space, run)
    assert [one.id for one in space.data()] == [run.data]


def test_a_chat_ends_with_its_run(
    client: Client, space: Workspace, run: Run, standing_in: None
) -> None:
    path = f"/api/runs/{run.id}/chat"
    client.json("POST", path)
    until(lambda: client.json("GET", path)["state"] == "ready")
    chat = store.read_json(run.job("chat").record)
    client.json("DELETE", f"/api/runs/{run.id}")
    assert not run.desk.exists()
    assert not jobs.lives(chat["pid"], chat["began"])


def test_a_run_at_work_is_not_removed(
    client: Client, space: Workspace, run: Run, standing_in: None
) -> None:
    client.json("POST", f"/api/runs/{run.id}/begin", {"verb": "train"})
    assert (
        "run: still at work on this run; stop it first"
        in client.refused("DELETE", f"/api/runs/{run.id}")["error"]
    )
    client.json("POST", f"/api/runs/{run.id}/stop")
    client.json("DELETE", f"/api/runs/{run.id}")  # what was asked to end is waited for
    assert not run.desk.exists()


def test_runs_of_other_folders_are_shown_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "deep" / "run"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"kind": "compare"}')
    space = Workspace(tmp_path / "space", runs=[tmp_path / "mine"])
    (found,) = space.runs()
    assert (found.title, found.is_own, runs.find_state(found)) == (
        "mine/deep/run",
        False,
        ("stopped", ""),
    )
    (folder / ".owner.json").write_text(
        json.dumps({"pid": os.getpid(), "host": os.uname().nodename})
    )
    assert runs.find_state(found)[0] == "running"
    for refused in (
        lambda: runs.stop(found),
        lambda: runs.resume(space, found),
        lambda: runs.begin(space, found, "train", None),
        lambda: runs.start_look(space, found, "check"),
        lambda: runs.remove(space, found),
    ):
        with pytest.raises(StoreError):
            refused()
    assert sorted(path.name for path in folder.iterdir()) == [".owner.json", "manifest.json"]


# ---- chat and export


def test_a_chat_is_proxied_and_ended(
    space: Workspace, run: Run, client: Client, standing_in: None
) -> None:
    path = f"/api/runs/{run.id}/chat"
    assert client.json("GET", path)["state"] == "off"
    first = [{"role": "user", "content": "hi"}]
    assert (
        "has ended"
        in client.refused("POST", f"{path}/ask", {"model": "tell", "messages": first})["error"]
    )
    client.json("POST", path)
    told = until(lambda: (found := client.json("GET", path))["state"] == "ready" and found)
    assert told["models"] == ["base", "sft", "tell"]
    turns = [*first, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "there"}]
    status, body, headers = client.ask(
        "POST",
        f"{path}/ask",
        json.dumps({"model": "tell", "messages": turns}).encode(),
        Content_Type="application/json",
    )
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    parts = [
        json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")
    ]
    assert (
        "".join(part["choices"][0]["delta"]["content"] for part in parts)
        == "tell heard there <b>and</b> 3 turns "
    )
    assert (
        client.refused("POST", f"{path}/ask", {"model": "none", "messages": turns[:1]})["error"]
        == "not answered: no such model"
    )
    assert (
        client.refused(
            "POST",
            f"{path}/ask",
            {"model": "tell", "messages": [{"role": "system", "content": "x"}]},
        )["status"]
        == 422
    )
    assert client.json("DELETE", path)["state"] == "off"
    until(lambda: not jobs.is_running(run.job("chat")))


def test_a_chat_ends_with_the_server_when_idle_and_where_one_was_left(
    space: Workspace, run: Run, standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run.job("chat")
    with served(space) as (client, _):
        client.json("POST", f"/api/runs/{run.id}/chat")
        assert jobs.is_running(job)
    until(lambda: not jobs.is_running(job))
    talks = chat.Talks(space)
    talks.begin(run)
    talks.end_if_idle()
    assert talks.run is run
    monkeypatch.setattr(chat, "IDLE_SECONDS", -1.0)
    talks.end_if_idle()
    until(lambda: not jobs.is_running(job))
    talks.begin(run)
    chat.Talks(space)  # after a server that was killed
    until(lambda: not jobs.is_running(job))


def test_an_export_is_downloaded_whole(client: Client, run: Run) -> None:
    folder = runs.export_folder(run, "export-tell-merged")
    folder.mkdir(parents=True)
    content = {
        "export.json": b"{}",
        "model.safetensors": bytes(range(256)) * 9000,
        "README.md": "é".encode(),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    status, body, headers = client.ask("GET", f"/runs/{run.id}/exports/export-tell-merged.zip")
    assert (status, headers["content-disposition"]) == (
        200,
        'attachment; filename="export-tell-merged.zip"',
    )
    archive = zipfile.ZipFile(io.BytesIO(body))
    assert archive.testzip() is None
    assert {name: archive.read(name) for name in archive.namelist()} == content


def test_only_what_is_there_is_exported(space: Workspace, run: Run) -> None:
    assert runs.EXPORTS == export.KINDS
    for to, arm, quantization in (
        ("adapter", "tell", "q8_0"),
        ("exe", "tell", "q8_0"),
        ("gguf", "../x", "q8_0"),
        ("gguf", "tell", "q4"),
    ):
        with pytest.raises(ConfigError, match="no export of"):
            runs.export(space, run, to, arm, quantization)


# ---- what commands write for it


def test_minutes_are_the_sum_of_what_is_planned(tmp_path: Path) -> None:
    """24 rows, of which a fifth is dev: each trial is its rows, its looks at dev rows, and its
    beginning."""
    settings = comparison_settings(
        save_task(tmp_path, 24, 6), tmp_path / "out", mix={"general_per_task": 2, "repeats": 3}
    )
    rows = run_data.prepare(settings, tiny_tokenizer(), None, 0)
    (task,) = rows.tasks
    speed = Speed(task=1.0, general=10.0, scored=100.0, answered=1000.0, start=1e5)
    found = budget.estimate_training(resolve(own_arm(settings), rows, settings), speed)
    looks = settings.train.evaluations * len(task.dev) * 100
    held_out = sum(map(len, rows.held_out.values()))
    assert found.trainings == 1
    assert found.seconds == 1e5 + 3 * len(task.train) + 10 * 6 * len(
        task.train
    ) + looks + 2 * 100 * (6 + held_out)
    asked = settings.model_copy(
        update={"tasks": (settings.tasks[0].model_copy(update={"metrics": ("exact_match",)}),)}
    )
    more = budget.estimate_training(resolve(own_arm(settings), rows, asked), speed).seconds
    assert more is not None
    assert more - found.seconds == 2 * 6 * 1000


def test_init_and_check_write_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_task(tmp_path, 40, 12)
    with (tmp_path / "train.jsonl").open("a") as stream:
        stream.write(
            '{"prompt": "", "completion": ""}\n{"prompt": "colour ant 0", "completion": "red"}\n'
        )
    done("init", "train.jsonl", "--test", "test.jsonl", "--model", "model", "--json", "seen.json")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["format"], seen["kept"], seen["rejected"], sum(seen["reasons"].values())) == (
        "prompt+completion",
        40,
        2,
        2,
    )
    assert (seen["rows"][0]["messages"][1]["content"], len(seen["rows"]), len(seen["rejects"])) == (
        "red",
        5,
        2,
    )
    changes = [
        "general=pool.jsonl",
        "mix.repeats=1",
        "mix.general_per_task=1",
        "eval.general_rows=2",
        "train.dtype=float32",
        "task.metrics=nll",
        "train.lora_r=2",
    ]
    said = done(
        "check",
        "train.yaml",
        "--rows",
        "2",
        "--minutes",
        "--json",
        "check.json",
        *(word for change in changes for word in ("--set", change)),
    )
    found = json.loads((tmp_path / "check.json").read_text())
    assert [row["source"] for row in found["rows"]] == ["train", "train", "general"]
    kinds = [kind for kind, _ in found["rows"][0]["spans"]]
    assert kinds == ["prompt", "anchor", "prompt", "trained", "end"]
    for kind, text in found["rows"][0]["spans"][1:2]:
        assert f"[[{kind}]]{text}[[/{kind}]]" in said
    (training,) = found["trainings"]
    assert training["share"]["examples"] == 0.5
    assert [(one["verb"], one["seconds"] > 0) for one in found["expected"]] == [
        ("train", True),
        ("compare", True),
    ]
    assert "an estimate" in said
