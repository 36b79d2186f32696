"""Run a suite: scripts x environments x seeds, each a process of its own; safe to kill and repeat.

    python -m benchmark.sweep mujoco
    python -m benchmark.sweep mujoco --scripts ppo_continuous --env-ids Hopper-v5 --num-seeds 3
    python -m benchmark.sweep mujoco --dry-run

Started again it skips what is complete, resumes what has a checkpoint and tries failures again.
Ctrl-C lets every job checkpoint first. Exit code 0: all complete; 1: something is missing; 2: the
command line was wrong and nothing was started; 130 or 143: interrupted.
"""

import collections
import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from benchmark import jobs
from benchmark.jobs import Job, Source
from benchmark.results import ROOT, folder_name

SUITES = Path(__file__).resolve().parent / "suites"


@dataclass(frozen=True)
class Options:
    suite: Annotated[str, tyro.conf.Positional]
    """Name of a file in benchmark/suites, or the path of a .toml file of your own."""
    scripts: tuple[str, ...] = ()
    """Only these scripts of the suite."""
    env_ids: tuple[str, ...] = ()
    """These environments instead of the suite's."""
    seeds: str = ""
    """Which seeds: one (21), a range (11-15), a list (3,7,9); by default the suite's."""
    num_seeds: int | None = None
    """How many seeds: the first of the suite, and numbers after its last if it has not so many."""
    args: str = ""
    """More arguments for every job, as one word: --args="--compile --total-timesteps 2e6"."""
    run_root: Path | None = None
    """Where the run folders go; by default runs/{suite}. On a cluster a folder all nodes share."""
    workers: int = field(default_factory=jobs.cores)
    """Jobs at once on this machine; by default one for each core."""
    retries: int = 2
    """How often a crashed or killed job is tried again, from its checkpoint."""
    track: bool = False
    """Log every job to Weights & Biases, grouped by script and environment."""
    dry_run: bool = False
    """Print the commands and start nothing."""
    job: int | None = None
    """Only the job of this number, as --dry-run | cat -n counts them: for job arrays."""
    engine: Literal["local", "ray"] = "local"
    """local: processes here. ray: tasks of a Ray cluster (benchmark/requirements-cluster.txt)."""
    ray_address: str | None = None
    """Address of the cluster, host:port or auto; by default what the variable RAY_ADDRESS says, and
    without it a new cluster on this machine alone."""
    cpus_per_job: float = 1
    """Cores that Ray keeps for a job."""
    gpus_per_job: float = 0
    """GPUs that Ray keeps for a job; 0.25 lets four jobs share one."""


# From here on they are benchmark.tune's alone, so that no result is of one of them.
TUNING_SEEDS = 1_000_000
SUITE_KEYS = ("seeds", "runs")
GROUP_KEYS = ("name", "scripts", "env_ids", "args", "grid")


def wrong(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def say(text: str) -> None:
    """Print a line, even if what read the lines before (tee, head) has ended."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def read_options(kind: type, description: str) -> Any:
    """Read the command line; what reads its --help, such as head, may end early."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return tyro.cli(kind, description=description)
    finally:
        signal.signal(signal.SIGPIPE, before)


# ---- From the command line to jobs ---------------------------------------------------------------


def read_suite(name: str) -> dict:
    """The suite's seeds and groups of runs."""
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    known = ", ".join(sorted(path.stem for path in SUITES.glob("*.toml")))
    try:
        suite = tomllib.loads(path.read_text("utf-8-sig"))
        runs = suite["runs"]
        if not (runs and all(isinstance(group, dict) for group in runs)):
            wrong(f"suite {path}: runs is a list of groups, each below a line [[runs]]")
        for keys, known_keys in [(suite, SUITE_KEYS), *((x, GROUP_KEYS) for x in suite["runs"])]:
            if unknown := sorted(keys.keys() - set(known_keys)):
                wrong(f"suite {path}: unknown {unknown[0]}: there are {', '.join(known_keys)}")
        for group in suite["runs"]:
            for words in (group["scripts"], group["env_ids"], group.setdefault("args", [])):
                if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                    wrong(f"suite {path}: scripts, env_ids and args are lists of strings")
            if not (group["scripts"] and group["env_ids"]):
                wrong(f"suite {path}: scripts and env_ids must not be empty")
            name = group.setdefault("name", "")
            if not re.fullmatch(r"[\w .+-]*", name):
                wrong(f"suite {path}: name {name}: letters, digits and spaces, please")
            for flag, values in group.get("grid", {}).items():
                named = re.fullmatch(r"[a-z][a-z0-9-]*", flag)
                if not (isinstance(values, list) and values and named):
                    wrong(f"suite {path}: grid has a list of values for each flag, without --")
            for script in group["scripts"]:
                if "/" in script or not (ROOT / f"{script}.py").is_file():
                    wrong(f"suite {path}: there is no {script}.py in {ROOT}")
        suite["runs"] = [part for group in suite["runs"] for part in expand(group)]
        for name in (group["name"] for group in suite["runs"]):
            if "__" in name or ".old-" in name:
                wrong(f"suite {path}: name {name}: without __ and .old-, please")
        titles = [
            (script, title(env_id, group["name"]))
            for group in suite["runs"]
            for script in group["scripts"]
            for env_id in group["env_ids"]
        ]
        for (script, env), count in collections.Counter(titles).items():
            if count > 1:
                wrong(f"suite {path}: {script} on {env} stands there twice: give one a name")
        seeds = suite["seeds"]
        if not (seeds and all(type(seed) is int and 0 <= seed < TUNING_SEEDS for seed in seeds)):
            wrong(f"suite {path}: seeds is a list of whole numbers from 0 to {TUNING_SEEDS - 1:,}")
        if len(set(seeds)) < len(seeds):
            wrong(f"suite {path}: a seed stands twice in {seeds}")
        return suite
    except FileNotFoundError:
        wrong(f"no suite {name}: there are {known}, or give the path of a .toml file")
    except KeyError as error:
        wrong(f"suite {path}: {error.args[0]} is missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wrong(f"suite {path}: {error!r}")


def title(env_id: str, name: str) -> str:
    """What a row of the report is called: "Ant-v5", or with its group's name "Ant-v5, name"."""
    return f"{env_id}, {name}" if name else env_id


def choose_seeds(options: Options, default: list[int]) -> list[int]:
    """The suite's seeds, or what --seeds or --num-seeds make of them."""
    seeds, after = list(default), max(default, default=0) + 1
    if options.num_seeds is not None:
        if not 1 <= options.num_seeds < TUNING_SEEDS or options.seeds:
            wrong(f"--num-seeds {options.num_seeds}: must be 1 or more, and without --seeds")
        seeds = [*default, *range(after, after + options.num_seeds)][: options.num_seeds]
    elif options.seeds:
        seeds = []
        for part in options.seeds.split(","):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
            if not match or int(match[2] or match[1]) < int(match[1]):
                wrong(f"--seeds {options.seeds}: one (21), a range (11-15) or a list (3,7,9)")
            if (last := int(match[2] or match[1])) >= TUNING_SEEDS:
                wrong(f"seed {last}: those from {TUNING_SEEDS:,} on are benchmark.tune's")
            seeds += range(int(match[1]), last + 1)
    if max(seeds, default=0) >= TUNING_SEEDS:
        wrong(f"seed {max(seeds)}: those from {TUNING_SEEDS:,} on are benchmark.tune's")
    return list(dict.fromkeys(seeds))


def expand(group: dict) -> list[dict]:
    """A group with a grid as one named group for each combination of the grid's values."""
    grid = group.pop("grid", {})
    groups = []
    for values in itertools.product(*grid.values()):
        names, more = [group["name"]], []
        for flag, value in zip(grid, values, strict=True):
            words = flag_words(flag, value)
            # What JSON has, say, is not for the names of folders.
            names.append(re.sub(r"[^\w .+-]+", "-", " ".join(words).removeprefix("--")))
            more += words
        name = " ".join(filter(None, names))
        groups.append(group | {"name": name, "args": [*group["args"], *more]})
    return groups


def flag_words(flag: str, value: object) -> list[str]:
    """A flag and its value as a command line has them."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def load_script(name: str):
    """The script as a module; importing one has no side effect."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        wrong(f"{name}.py cannot be imported: {error!r}")
    if not (hasattr(module, "Args") and hasattr(module, "parse_args")):
        wrong(f"{name}.py has no Args and parse_args, as the scripts here have")
    return module


def resolve(script: str, env_id: str, arguments: list[str]) -> dict:
    """Every argument as the script itself understands the command line."""
    ours = {"env_id": env_id, "seed": 0, "run_dir": "a job's", "resume": None, "evaluate": None}
    module, argv = sys.modules.get(script) or load_script(script), sys.argv
    first = ["--env-id", env_id, "--seed", "0", "--run-dir", ours["run_dir"]]
    sys.argv = [f"{script}.py", *first, *arguments]
    try:
        resolved = asdict(module.parse_args(module.Args))
    except SystemExit:
        wrong(f"{script}.py refuses {shlex.join([*first[:2], *arguments])}")
    finally:
        sys.argv = argv
    if changed := [name for name, value in ours.items() if resolved[name] != value]:
        flag = changed[0].replace("_", "-")
        wrong(f"--{flag} among the arguments of {script}: the sweep sets it for each job")
    return resolved


def check_environment(env_id: str) -> None:
    """Refuse what Gymnasium does not know, before anything starts."""
    import gymnasium

    with contextlib.suppress(ImportError):
        import ale_py

        gymnasium.register_envs(ale_py)
    try:
        module, _, name = env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
    except Exception as error:  # a module that is imported can raise anything
        known = isinstance(error, gymnasium.error.Error | ImportError)
        wrong(f"--env-ids {env_id}: {error if known else repr(error)}")


def plan(options: Options) -> tuple[list[Job], list[Source]]:
    """The jobs in order: seeds innermost, so that a table fills row by row; and the scripts."""
    suite = read_suite(options.suite)
    groups = suite["runs"]
    names = list(dict.fromkeys(name for group in groups for name in group["scripts"]))
    for name in options.scripts:
        if name.removesuffix(".py") not in names:
            wrong(f"--scripts {name}: the suite has {', '.join(names)}")
    chosen = [name.removesuffix(".py") for name in options.scripts] or names
    seeds = choose_seeds(options, suite["seeds"])
    known = {env_id for group in groups for env_id in group["env_ids"]}
    try:
        extra = [*shlex.split(options.args), *(["--track"] if options.track else [])]
    except ValueError as error:
        wrong(f"--args {options.args}: {error}")
    root = (options.run_root or Path("runs") / Path(options.suite).stem).absolute()
    together = collections.Counter(map(folder_name, {*known, *options.env_ids}))
    planned: dict[Path, Job] = {}
    sources = {script: jobs.read_source(script) for script in chosen}
    plain = not all(group["name"] for group in groups)  # those take the environments that are new
    for group in groups:
        new = {env for env in options.env_ids if env not in known and not (plain and group["name"])}
        for script in (name for name in group["scripts"] if name in chosen):
            wanted = [env for env in options.env_ids if env in group["env_ids"] or env in new]
            for env_id in wanted if options.env_ids else group["env_ids"]:
                check_environment(env_id)
                arguments = [*group["args"], *extra]
                resolved = resolve(script, env_id, arguments)
                code, digest = sources[script].code, sources[script].digest
                place = folder_name(env_id)
                if together[place] > 1:  # another environment's folders have this name, too
                    place += "~" + hashlib.sha256(env_id.encode()).hexdigest()[:6]
                for seed in seeds:
                    folder = root / f"{title(place, group['name'])}__{script}__{seed}"
                    about = json.dumps(resolved | {"seed": seed})
                    words = tuple(arguments)
                    job = Job(script, env_id, seed, words, about, code, digest, folder)
                    first = planned.setdefault(folder, job)
                    if first.arguments != words and seed == seeds[0]:
                        taken = shlex.join(first.arguments)
                        warn(f"{script} on {env_id} fits several groups: as in the first, {taken}")
    if not planned:
        wrong("nothing to run: none of these scripts and environments go together in this suite")
    return list(planned.values()), list(sources.values())


# ---- Engines: how jobs run; each yields now and then, so that the board can be drawn -------------


class Stop:
    """Set by a signal; engines then let their jobs checkpoint.

    A repeat within two seconds is the same wish, sent to the group and passed on by a parent; a
    later one ends at once.
    """

    def __init__(self) -> None:
        self.signal, self.time = 0, 0.0
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if number != signal.SIGHUP or not ignored:  # by nohup
                signal.signal(number, self.set)

    def set(self, number: int, frame: object) -> None:
        if self.signal and time.monotonic() - self.time > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.time = self.time if self.signal else time.monotonic()
        self.signal = self.signal or number


def run_local(todo: list[Job], options: Options, stop: Stop, failed: dict[Job, str]) -> Iterator:
    """At most `workers` processes at once; fills `failed` with reasons."""
    queue, running, attempts = collections.deque(todo), {}, collections.Counter()
    while (queue and not stop.signal) or running:
        for _ in range(len(queue)):
            if len(running) >= options.workers or stop.signal:
                break
            job = queue.popleft()
            if jobs.status(job) == "complete":  # another sweep did it
                continue
            if process := jobs.start(job):
                running[job] = process
                attempts[job] += 1
            else:
                queue.append(job)  # another process has it; look again later
        if stop.signal and running:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            return
        for job, process in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[job]
            if jobs.status(job) == "complete":
                continue
            if jobs.worth_a_retry(code) and attempts[job] <= options.retries:
                queue.appendleft(job)
            else:
                failed[job] = jobs.failure(job, code)
        yield
        time.sleep(0.2)


def run_on_ray(todo: list[Job], options: Options, stop: Stop, failed: dict[Job, str]) -> Iterator:
    """One Ray task a job; Ray finds the node, and another one when that node dies."""
    try:
        import ray
    except ImportError:
        wrong("--engine ray needs Ray: pip install -r benchmark/requirements-cluster.txt")

    address = options.ray_address or os.environ.get("RAY_ADDRESS") or "local"

    def no_answer() -> None:
        print(f"error: --ray-address {address}: no answer in 15 s", file=sys.stderr)
        os._exit(2)  # Ray itself would go on trying for minutes, and not be interrupted

    watch = threading.Timer(15, no_answer)
    if address != "local":  # starting a cluster here may take longer
        watch.start()
    try:
        host, _, port = address.rpartition(":")
        if host and "/" not in host:
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        stop.listen()  # Ray has taken SIGTERM
    except (OSError, RuntimeError, ValueError) as error:
        wrong(f"--ray-address {address}: {error}")
    finally:
        watch.cancel()
    need = {"CPU": options.cpus_per_job, "GPU": options.gpus_per_job}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= count for name, count in need.items()) for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        ray.shutdown()
        wrong(
            f"--cpus-per-job {need['CPU']:g} --gpus-per-job {need['GPU']:g}: no node has as many;"
            f" CPUs and GPUs of the nodes: {have}"
        )

    def task(root: str, job: dict, retries: int) -> str:  # travels whole, needs nothing installed
        # Ray cancels with SIGINT, which what is started in the background by a shell ignores.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, root)
        from benchmark import jobs

        return jobs.run(jobs.Job(**job), retries)

    needs = {"num_cpus": options.cpus_per_job, "num_gpus": options.gpus_per_job}
    remote = ray.remote(**needs, max_retries=options.retries, scheduling_strategy="SPREAD")(task)
    refs = {remote.remote(str(ROOT), vars(job), options.retries): job for job in todo}
    while refs and not stop.signal:
        done, _ = ray.wait(list(refs), timeout=1)
        for ref in done:
            job = refs.pop(ref)
            try:
                reason = ray.get(ref)
            except Exception as error:  # a node that died too often, a lost worker
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
            if reason:
                failed[job] = reason
        yield
    for ref in refs:
        ray.cancel(ref)
    patience = time.time() + 60
    while any(map(jobs.locked, refs.values())) and time.time() < patience:
        time.sleep(0.2)  # they checkpoint; shutting down would signal them again, and kill them
    ray.shutdown()


# ---- The board: what one sees --------------------------------------------------------------------


def describe(job: Job) -> tuple[str, str, str]:
    """Progress, speed and the newest return as text, from the last lines of the metrics."""
    newest: dict = {}
    for text in jobs.tail(job.folder / "metrics.jsonl", 16384):
        with contextlib.suppress(ValueError, TypeError):
            newest |= json.loads(text)
    share = newest.get("global_step", 0) / json.loads(job.resolved)["total_timesteps"]
    speed, recent = newest.get("charts/SPS"), newest.get("charts/episodic_return")
    final = newest.get("eval/episodic_return") if share >= 1 else None
    return (
        f"{min(1.0, share):.0%}",
        "" if speed is None else f"{speed:,.0f}/s",
        f"eval {final:.1f}" if final is not None else "" if recent is None else f"{recent:.1f}",
    )


class Board:
    """States of all jobs, read from disk; a live table in a terminal, plain lines elsewhere."""

    ORDER = ("running", "failed", "queued", "done")

    def __init__(self, planned: list[Job], failed: dict[Job, str]) -> None:
        self.planned, self.failed, self.live = planned, failed, None
        self.done = {job for job in planned if jobs.status(job) == "complete"}
        self.seen = dict.fromkeys(self.done, "done")
        self.drawn, self.said = 0.0, time.time()
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=2, transient=True)
            self.live.start()

    def state(self, job: Job) -> str:
        if job in self.failed:
            return "failed"
        if job in self.done or (not jobs.locked(job) and jobs.status(job) == "complete"):
            self.done.add(job)
            return "done"
        return "running" if jobs.locked(job) else "queued"

    def draw(self, last: bool = False) -> None:
        if time.time() - self.drawn < 0.5 and not last:
            return
        self.drawn = time.time()
        states = {job: self.state(job) for job in self.planned}
        counts = collections.Counter(states.values())
        head = ", ".join(
            f"{counts[name]} {name}" for name in ("done", "running", "queued", "failed")
        )
        if self.live:
            self.live.update(self.table(states, head))
            return
        for job, state in states.items():
            if self.seen.get(job) != state and (state != "queued" or job in self.seen):
                share, _, recent = describe(job)
                more = self.failed.get(job) or f"{share}  {recent}"
                say(f"{state:8}{job.name}  {more}")
            self.seen[job] = state
        if time.time() - self.said > 60:
            self.said = time.time()
            say(head)
            for job in (job for job, state in states.items() if state == "running"):
                say("        " + "  ".join([job.name, *describe(job)]))

    def table(self, states: dict[Job, str], head: str):
        from rich.table import Table

        table = Table(title=head, title_justify="left", box=None, pad_edge=False)
        for name in ("job", "state", "progress", "steps/s", "return"):
            table.add_column(name, justify="left" if name in ("job", "state") else "right")
        rows = sorted(self.planned, key=lambda job: self.ORDER.index(states[job]))
        room = max(5, self.live.console.height - 4)
        for job in rows[:room]:
            style = {"running": "bold", "failed": "red", "done": "green"}.get(states[job], "dim")
            table.add_row(job.name, states[job], *describe(job), style=style)
        if len(rows) > room:
            table.add_row(f"and {len(rows) - room} more", style="dim")
        return table

    def close(self) -> None:
        """Draw for the last time, and give the terminal back."""
        try:
            self.draw(last=True)
        finally:
            if self.live:
                self.live.stop()


def show(path: Path) -> Path:
    """As the user would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def print_commands(planned: list[Job]) -> None:
    """A line for each job, whatever its state: batch systems count them. Remarks go to stderr."""
    for job in planned:
        state, text = jobs.status(job), shlex.join(jobs.command(job, "python", relative=True))
        if state == "other":
            print(other(job), file=sys.stderr)
        if aside := jobs.kept_aside(job):
            remark = f"{job.name} was set aside as {aside.name}: it will be brought back"
            print(remark, file=sys.stderr)
            state = jobs.status(job, aside)
        print(f"# complete: {text}" if state == "complete" else text)


def other(job: Job) -> str:
    """A line about a folder that holds another run than the job's."""
    try:
        how = "; ".join(jobs.differences(job, job.folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        how = "not a whole one"
    return f"{job.name} holds another run ({how}): it will be kept, renamed"


def main() -> None:
    options = read_options(Options, __doc__)
    if options.workers < 1 or options.retries < 0:
        wrong("--workers must be at least 1, --retries 0 or more")
    if options.cpus_per_job <= 0 or options.gpus_per_job < 0:
        wrong("--cpus-per-job must be above 0, --gpus-per-job 0 or more")
    if options.engine != "ray" and (options.ray_address or options.gpus_per_job):
        wrong("--ray-address and --gpus-per-job are for --engine ray")
    stop = Stop() if not options.dry_run else None  # Ctrl-C while it plans: nothing is started
    planned, sources = plan(options)
    if options.job is not None:
        if not 1 <= options.job <= len(planned):
            wrong(f"--job {options.job}: there are {len(planned)}, counted from 1")
        planned = planned[options.job - 1 : options.job]
    if options.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into head, say
        return print_commands(planned)
    failed: dict[Job, str] = {}
    root = show(planned[0].folder.parent)
    try:
        for source in sources:
            source.keep(planned[0].folder.parent)
        for job in planned:
            jobs.bring_back(job)
    except OSError as error:
        wrong(f"--run-root {root}: {error}")
    states = collections.Counter(map(jobs.status, planned))
    say(
        f"{len(planned)} jobs: {states['complete']} complete, {states['begun']} to resume,"
        f" {states['new'] + states['other']} to start"
    )
    for job in planned:
        if jobs.status(job) == "other":
            say(other(job))
    todo = [job for job in planned if jobs.status(job) != "complete"]
    engine: Callable = run_on_ray if options.engine == "ray" else run_local
    board = Board(planned, failed)
    try:
        for _ in engine(todo, options, stop, failed):
            board.draw()
    except OSError as error:  # a full or read-only disk, or one without locks
        print(f"error: --run-root {root}: {error}; go on: the same command again", file=sys.stderr)
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            board.close()
    missing = [job for job in planned if jobs.status(job) != "complete"]
    for job in missing:
        if job in failed or not stop.signal:
            say(f"missing {job.name}: {failed.get(job, 'not begun')}; its log: {show(job.log)}")
    say(f"{len(planned) - len(missing)} of {len(planned)} complete in {root}")
    if stop.signal:
        say("stopped, with checkpoints; go on: the same command again")
        sys.exit(128 + stop.signal)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
