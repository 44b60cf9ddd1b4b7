"""Packages that stand in for Trackio, Weights & Biases and MLflow: their names, the signatures that
are called, and their ways.

Trackio ends the run that its context began before, MLflow keeps a stack of active runs for each
thread, W&B begins as many runs as it is asked to. Each writes what it is told into the file that
$TOLD names, as JSON lines: begin, log, files or finish, the run's name, and what about it.
"""

from pathlib import Path

_TELL = """
import json, os, threading
from contextvars import ContextVar

LOCK = threading.Lock()

def tell(what, run, *about):
    with LOCK, open(os.environ["TOLD"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps([what, run, *about]) + "\\n")

def text(path):
    with open(path, encoding="utf-8") as stream:
        return stream.read()
"""

_RUN = """
class Run:
    def __init__(self, name, id):
        self.name, self.id, self.over = name, id, False

    def log(self, data, step=None):
        assert not self.over, f"{self.name} is over"
        tell("log", self.name, step, data)

    def log_artifact(self, artifact_or_path, name=None, type=None, aliases=None):
        files = artifact_or_path.files
        tell("files", self.name, {file: text(path) for file, path in files.items()})

    def finish(self):
        self.over = True
        tell("finish", self.name)
"""

TRACKIO = f"""{_TELL}{_RUN}
current_run = ContextVar("current_run", default=None)
known = []

class Artifact:
    def __init__(self, name, type, description=None, metadata=None):
        self.files = {{}}

    def add_file(self, local_path, name=None):
        self.files[name] = local_path

def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
         bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
         auto_log_gpu=None, gpu_log_interval=10.0):
    if current_run.get() is not None:
        current_run.get().finish()
    away = bool(space_id or server_url)
    facts = {{"project": project, "group": group, "again": resume == "allow", "away": away}}
    tell("begin", name, facts)
    current_run.set(Run(name, name))
    return current_run.get()
"""

WANDB = f"""{_TELL}{_RUN}
known = set()

class Artifact:
    def __init__(self, name, type, description=None, metadata=None, incremental=False, use_as=None):
        assert all(letter.isalnum() or letter in "-_." for letter in name), name
        self.files = {{}}

    def add_file(self, local_path, name=None, is_tmp=False, skip_cache=False, policy="mutable",
                 overwrite=False):
        self.files[name] = local_path

def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
         config=None, group=None, job_type=None, mode=None, force=None, reinit=None, resume=None,
         save_code=None, settings=None):
    assert reinit == "create_new", "another run would be ended or returned"
    away = mode != "offline"
    facts = {{"project": project, "group": group, "again": id in known, "away": away, "dir": dir}}
    tell("begin", name, facts)
    known.add(id)
    return Run(name, id)
"""

MLFLOW = f"""{_TELL}
from types import SimpleNamespace

names, made, local = {{}}, [], threading.local()

def stack():
    local.stack = getattr(local, "stack", [])
    return local.stack

def search_experiments(view_type=1, max_results=None, filter_string=None, order_by=None):
    return [one for one in made if filter_string == f"name = '{{one.name}}'"]

def create_experiment(name, artifact_location=None, tags=None, trace_location=None):
    assert not search_experiments(filter_string=f"name = '{{name}}'"), "it is there already"
    made.append(SimpleNamespace(name=name, experiment_id=str(len(made)), place=artifact_location))
    return made[-1].experiment_id

def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None,
              tags=None, description=None):
    assert nested or not stack(), "a run is active already"
    one = next(one for one in made if one.experiment_id == experiment_id)
    again, run_id = run_id is not None, run_id or f"id{{len(names)}}"
    names[run_id] = run_name
    away = not os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:///")
    telemetry = os.environ.get("MLFLOW_DISABLE_TELEMETRY") != "true"
    facts = {{"project": one.name, "again": again, "away": away or telemetry, "dir": one.place}}
    tell("begin", run_name, facts)
    stack().append(SimpleNamespace(info=SimpleNamespace(run_id=run_id)))
    return stack()[-1]

def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None,
                dataset=None):
    tell("log", names[run_id or stack()[-1].info.run_id], step, metrics)

def log_artifact(local_path, artifact_path=None, run_id=None):
    file = os.path.join(artifact_path or "", os.path.basename(local_path))
    tell("files", names[run_id or stack()[-1].info.run_id], {{file: text(local_path)}})

def end_run(status="FINISHED"):
    if stack():
        tell("finish", names[stack().pop().info.run_id])
"""


def write(folder: Path) -> Path:
    """Write the packages into a folder; returns it."""
    for name, code in (("trackio", TRACKIO), ("wandb", WANDB), ("mlflow", MLFLOW)):
        (folder / f"{name}.py").write_text(code)
    return folder
