"""A job of a sweep: one script, one environment, one seed, in one folder. Its state is on disk.

What is complete, what can be resumed and what is running is read from the run folder and from a
lock on the job's log, never from memory, so that a sweep may die at any instant, and two sweeps
over the same folders do not disturb each other.
"""

import ctypes
import fcntl
import functools
import glob
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmark.results import ROOT, code_hash, hardware, hash_of_text, relevant

USERS_MISTAKE, NOT_FINITE = 2, 3  # exit codes of the scripts that a second try would repeat


@dataclass(frozen=True)
class Source:
    """A script as it is when a sweep begins: somebody may edit it while the sweep runs."""

    script: str
    text: str

    @property
    def code(self) -> str:
        return hash_of_text(self.text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def keep(self, root: Path) -> None:
        """Write it beside the run folders, for the jobs to run. Raises: OSError."""
        folder = root / "code" / self.digest
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{self.script}.{os.urandom(4).hex()}"  # other nodes write it, too
        part.write_text(self.text, "utf-8")
        part.rename(folder / f"{self.script}.py")  # whole at every instant: another may start it


def read_source(script: str) -> Source:
    return Source(script, (ROOT / f"{script}.py").read_text("utf-8-sig"))


@dataclass(frozen=True)
class Job:
    script: str
    env_id: str
    seed: int
    arguments: tuple[str, ...]  # what the command line has besides environment, seed and folder
    resolved: str  # every argument as the script understands it, as JSON
    code: str  # hash of the script's algorithm
    digest: str  # hash of the script's text
    folder: Path

    @property
    def source(self) -> Path:
        """What it runs: a Source that was kept."""
        return self.folder.parent / "code" / self.digest / f"{self.script}.py"

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    @property
    def name(self) -> str:
        return self.folder.name


def about(folder: Path) -> dict | None:
    """What args.json says, or None where no run has begun. Raises: ValueError if it is torn."""
    try:
        return json.loads((folder / "args.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def tail(path: Path, size: int = 65536) -> list[str]:
    """The last lines of a file, the first of them perhaps cut; none where there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def last_metrics(folder: Path) -> dict:
    """The last line of metrics.jsonl; {} where there is none or it is torn."""
    try:
        line = json.loads(tail(folder / "metrics.jsonl")[-1])
        return line if isinstance(line, dict) else {}
    except (IndexError, ValueError):
        return {}


def status(job: Job, folder: Path | None = None) -> str:
    """What the folder holds: "new", "begun", "complete", or a run that is "other" than the job's.

    Complete needs the same arguments, the same algorithm, and the final evaluation.
    """
    folder = folder or job.folder
    try:
        run = about(folder)
        if run is None:
            return "new"
        if differences(job, folder):
            return "other"
        last = last_metrics(folder)
        done = last.get("global_step", 0) >= run["args"]["total_timesteps"]
        return "complete" if done and last.get("eval/episodes") else "begun"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        return "other"


def differences(job: Job, folder: Path) -> list[str]:
    """What tells the folder's run from the job's, in words. Raises as status says."""
    run = about(folder) or {}
    was, now = relevant(run["args"]), relevant(json.loads(job.resolved))
    changed = [key for key in sorted(was | now) if was.get(key) != now.get(key)]
    said = [f"{key} {was.get(key)}, now {now.get(key)}" for key in changed]
    if run["script"] != f"{job.script}.py" or hash_of(folder / run["script"]) != job.code:
        said.append("another algorithm")
    return said


def hash_of(script: Path) -> str:
    """The hash of its algorithm, computed once as long as the file stays the same."""
    return cached_hash(script, script.stat().st_mtime_ns)


@functools.cache
def cached_hash(script: Path, time: int) -> str:
    return code_hash(script)


def set_aside(job: Job) -> Path:
    """Rename a folder whose run is not the job's; nothing is deleted. Returns the new name."""
    number = 1
    while (aside := job.folder.with_name(f"{job.name}.old-{number}")).exists():
        number += 1
    return job.folder.rename(aside)


def kept_aside(job: Job) -> Path | None:
    """Where a sweep with other arguments has put the job's run: the one that got furthest."""
    if status(job) in ("begun", "complete"):
        return None
    aside = job.folder.parent.glob(f"{glob.escape(job.name)}.old-*")
    found = [folder for folder in aside if status(job, folder) in ("begun", "complete")]
    return max(found, key=lambda x: last_metrics(x).get("global_step", 0), default=None)


def bring_back(job: Job) -> None:
    """Put the job's run into its folder again, if it was set aside and nobody runs it."""
    found = kept_aside(job)
    if found and not in_use(found) and (log := lock(job)):
        with log:
            if job.folder.exists():
                set_aside(job)
            log.write(f"brought back from {found.rename(job.folder)}\n")


def command(job: Job, python: str = sys.executable, relative: bool = False) -> list[str]:
    """The command that starts the job, or goes on with it."""
    script, folder = job.source, job.folder
    if relative:
        script, folder = os.path.relpath(ROOT / f"{job.script}.py"), os.path.relpath(folder)
    if status(job) == "begun":
        return [python, str(script), "--resume", str(folder), *changed_on_resume(job)]
    start = [python, str(script), "--env-id", job.env_id, "--seed", str(job.seed)]
    return [*start, "--run-dir", str(folder), *job.arguments]


def changed_on_resume(job: Job) -> list[str]:
    """The flags that leave the numbers alone and are not what they were when the run began."""
    was, now = (about(job.folder) or {})["args"], json.loads(job.resolved)
    words = []
    for name in ("track", "capture_video", "eval_frequency", "checkpoint_frequency"):
        if name in now and now[name] != was.get(name):
            flag, value = name.replace("_", "-"), now[name]
            flag = f"no-{flag}" if value is False else flag
            words += [f"--{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def is_locked(path: Path) -> bool:
    """Whether another process holds the file's lock. Raises: OSError where there are no locks."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def in_use(folder: Path) -> bool:
    """Whether a process trains in it, started by hand perhaps: scripts lock their copy there."""
    return any(map(is_locked, folder.glob("*.py")))


def locked(job: Job) -> bool:
    """Whether a process runs this job now, started by whoever."""
    return is_locked(job.log) or in_use(job.folder)


def lock(job: Job) -> IO | None:
    """The job's log, open and locked; None where another process runs the job. Raises: OSError."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    file = open(job.log, "a")  # noqa: SIM115  stays open: the lock lives with it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not in_use(job.folder):
            return file
    except BlockingIOError:
        pass
    file.close()
    return None


def cores() -> int:
    """How many this process may use."""
    known = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def die_with_parent() -> None:
    """Linux: a job whose sweep is killed gets SIGTERM, checkpoints and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def start(job: Job) -> subprocess.Popen | None:
    """Start the job's process, output into its log; None where another process runs the job.

    The lock belongs to the open log file, which the process inherits: it ends with the process,
    even if this one is killed first.
    """
    log = lock(job)
    if log is None:
        return None
    with log:
        if status(job) == "other":
            log.write(f"an older run stood here: now {set_aside(job)}\n")
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "hardware.txt").write_text(f"{hardware()}\n")
        words = command(job)
        log.write(f"$ {shlex.join(words)}\n")
        log.flush()
        more = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # What stands beside the script can be imported, as if it were started where it stands.
        more["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )
        if (ROOT / ".git").exists():  # for the commit in args.json: the copy is in no repository
            more["GIT_DIR"] = str(ROOT / ".git")
        of_all_seeds = f"{job.script}__{job.name.rsplit('__', 2)[0]}"
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"WANDB_RUN_GROUP": of_all_seeds, **os.environ, **more, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which asks each job once
            preexec_fn=die_with_parent,
        )


def failure(job: Job, code: int) -> str:
    """Why it failed, in a line: the exit code and the last thing that the job said."""
    if code == 0:
        return "exit code 0, but its folder does not hold the whole run"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = [line for line in tail(job.log) if line.strip() and not line.startswith("$ ")]
    return f"{how}: {said[-1].strip()[:160]}" if said else how


def worth_a_retry(code: int) -> bool:
    """Mistakes, NaNs and good ends come back the same; crashes, kills and full memories may not."""
    return code not in (0, USERS_MISTAKE, NOT_FINITE)


def run(job: Job, retries: int) -> str:
    """Run a job to its end, in this thread: what a Ray task does. Returns "" or why it failed.

    Stopped by KeyboardInterrupt, it lets the job checkpoint before it passes that on.
    """
    for _ in range(retries + 1):
        process = None
        while process is None:
            if status(job) == "complete":
                return ""
            if (process := start(job)) is None:
                time.sleep(0.5)  # another process has it: a sweep before us, a node thought dead
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)  # short, so that Ray can interrupt it
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if status(job) == "complete":
            return ""
        reason = failure(job, code)
        if not worth_a_retry(code):
            break
    return reason
