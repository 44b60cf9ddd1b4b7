"""Run the steps of `same_behaviour.py` for one checkout, and write how each ended.

    python same_behaviour_run.py FOLDER ENDED.json < steps.json

Each step is a fork of this process, which has loaded torch and other libraries (that takes seconds)
but nothing of Fulcrum. The fork runs the package's main module, as `python -m fulcrum` does.
"""

import importlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.cookiejar import CookieJar
from pathlib import Path
from typing import IO, Any

PATIENCE = 900  # seconds that a step may take
LIBRARIES = (
    "accelerate",
    "datasets",
    "matplotlib.figure",
    "peft",
    "pyarrow.parquet",
    "rich.progress",
    "scipy.stats",
    "sacrebleu",
    "sklearn.linear_model",
    "torch",
    "transformers",
    "typer",
    "transformers.models.llama.modeling_llama",
)


def main() -> None:
    """Run all steps, one after the other."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    steps = json.load(sys.stdin)
    for name in LIBRARIES:
        importlib.import_module(name)
    os.chdir(folder)
    ended = []
    known: set[str] = set()
    for step in steps:
        act = ACTS.get(step["act"], call)
        try:
            code, out, err = act(step["args"], step["stdin"])
        except Exception as error:  # of a server that does not answer
            code, out, err = -1, "", f"{type(error).__name__}: {error}"
        there = {path.as_posix() for path in Path().rglob("*") if path.is_file()}
        ended.append(
            {
                "step": step["name"],
                "code": code,
                "stdout": out,
                "stderr": err,
                "files": sorted(there - known),  # that this step was the first to write
            }
        )
        known |= there
        print(f"{folder.name}: {step['name']}: exit {code}", file=sys.stderr, flush=True)
    target.write_text(json.dumps(ended), encoding="utf-8")


Ended = tuple[int, str, str]  # exit code, stdout, stderr


def call(words: Sequence[str], stdin: str, run: Callable[[], Any] | None = None) -> Ended:
    """Run `python -m fulcrum WORDS` to its end; `run` takes its place if given."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        process = multiprocessing.get_context("fork").Process(
            target=_become, args=(words, (given, out, err), run)
        )
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = -1 if process.exitcode is None else process.exitcode
        return code, _text(out), _text(err)


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode()


def _become(
    words: Sequence[str], streams: Sequence[IO[bytes]], run: Callable[[], Any] | None
) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["fulcrum", *words]
    if run is not None:
        run()
    else:
        runpy.run_module("fulcrum", run_name="__main__", alter_sys=True)


def python(words: Sequence[str], stdin: str) -> Ended:
    """Call the public Python functions."""
    file = Path(__file__).with_name("same_behaviour_python.py")
    return call(words, stdin, lambda: runpy.run_path(str(file), run_name="__main__"))


def serve(words: Sequence[str], stdin: str) -> Ended:
    """Start `fulcrum serve`, ask for its models and for an answer of each, and stop it."""
    answers: dict[str, Any] = {}
    with _server(words) as (address, process):
        listed = _json(urllib.request.urlopen, f"{address}/v1/models")
        answers["models"] = sorted(model["id"] for model in listed["data"])
        for name in answers["models"]:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": "colour ant 8"}],
                "max_tokens": 8,
            }
            request = urllib.request.Request(
                f"{address}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            answer = _json(urllib.request.urlopen, request)
            answers[name] = {key: answer[key] for key in ("model", "choices", "usage")}
    Path("serve.json").write_text(json.dumps(answers), encoding="utf-8")
    return process.returncode, "", ""


def ui(words: Sequence[str], stdin: str) -> Ended:
    """Start `fulcrum ui`, open the page, the list of runs and the page of each run, and stop it."""
    answers: dict[str, Any] = {}
    with _server(words) as (address, process):
        cookies = urllib.request.HTTPCookieProcessor(CookieJar())
        browse = urllib.request.build_opener(cookies).open
        with browse(address, timeout=PATIENCE) as page:
            answers["page"] = page.status
        root = address.partition("/?")[0]
        for run in _json(browse, f"{root}/api/runs"):
            place = f"{root}/api/runs/{run['id']}"
            shown = {key: run[key] for key in ("title", "verb", "state", "report", "set")}
            shown["changeable"] = _json(browse, place)["changeable"]
            if run["state"] == "finished":
                result = _json(browse, f"{place}/result")
                shown |= {key: result[key] for key in ("arms", "report", "certificate")}
            answers[shown["title"]] = shown
    Path("ui.json").write_text(json.dumps(answers), encoding="utf-8")
    return process.returncode, "", ""


ACTS: dict[str, Callable[[Sequence[str], str], Ended]] = {
    "python": python,
    "serve": serve,
    "ui": ui,
}


@contextmanager
def _server(words: Sequence[str]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Start a server, yield the first address that it prints, and stop it in the end."""
    command = [sys.executable, "-m", "fulcrum", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                address = re.search(r"http://127\.0\.0\.1:\d+\S*", line)
                if address is not None:
                    yield address[0], process
                    break
            else:
                raise RuntimeError(f"{' '.join(words)} did not start in {os.environ['PYTHONPATH']}")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)


def _json(ask: Callable[..., Any], address: Any) -> Any:
    with ask(address, timeout=PATIENCE) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
