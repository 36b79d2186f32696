"""Results of runs: read from run folders, and kept small beside the code.

    python -m benchmark.results RUN_DIR ...     collect runs into benchmark/results/

A RUN_DIR is a run folder, or a folder of run folders such as runs/mujoco. In
results/{script}/{environment}/, {seed}.csv holds a learning curve (training returns, thinned) and
meta.json what each run was: arguments, code, versions, hardware, wall time, final evaluation. A run
that did not finish is collected too, as such.
"""

import ast
import csv
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
POINTS = 100  # of a thinned curve
NEUTRAL = set(  # arguments that leave the numbers alone
    """run_dir resume evaluate track wandb_project_name wandb_entity capture_video
    checkpoint_frequency eval_frequency async_envs""".split()
)


# What of the run infrastructure the numbers of a run depend on, and calls that only say something.
INFRASTRUCTURE = "# ---- Run infrastructure"
STEPPING = "LONGEST_EPISODE setup Rng flatten_observations ReplayableEnv evaluate".split()
SAYING = {"stop", "warn", "require"}
# What else stands there in every script; what somebody adds may well change the numbers.
NEUTRAL_PARTS = set(
    """SCRIPT SHA256 LOCKS CLOSING parse_count flag_type Count Json Text require check_run_args
    parse_flags parse_args stop Stop refuse_exit forget_signals warn describe making close Run
    LeadingRun FollowingRun make_run""".split()
)


def dump(node: object) -> str:
    """A syntax tree as text, the same in every version of Python, which ast.dump's is not."""
    if isinstance(node, list):
        return f"[{', '.join(map(dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [(name, dump(value)) for name, value in ast.iter_fields(node)]
    # A newer version may add fields, which are empty in code that does not use them.
    kept = [f"{name}={text}" for name, text in parts if text not in ("None", "[]")]
    return f"{type(node).__name__}({', '.join(kept)})"


MAIN = 'if __name__ == "__main__":\n    '
CALLS = ("train(parse_args(Args))", "with CLOSING:\n        train(parse_args(Args))")  # before, now
MAINS = {dump(ast.parse(MAIN + call).body[0]) for call in CALLS}

# Changed code that makes the same numbers, and the code whose runs it may therefore stand with.
# What changed: what environments share with the process (threads, generators, a MuJoCo that
# cannot load) does a run no harm, whole numbers without bounds are not scaled, and a resume knows
# which of its environments were lost. Of each environment that had such runs of PPO, the beginning
# of one run (38,912 steps or more) and its final evaluation were made again: the same bit for bit.
# Then came environments that no such run had: ones that call sys.exit(), leave the directory, or
# send another byte order. Of each script some beginnings, with an evaluation: the same bit for bit.
# PPO_ATARI: how those of several processes end that have nothing to evaluate; no run had several.
# A2C and the DQNs: on vectors, they refuse two flags for games, which no run on vectors had. Then
# A2C's RMSProp took less memory (the same bit for bit), and the DQNs', which no run used, is new.
# SAC: logs V with --value-network; with it, without it and compiled: the same bit for bit.
# PPO, A2C, TRPO, REINFORCE: another scale of rewards where the std of returns is below a tenth of
# their mean. In the beginnings of runs it was 0.23 of it or more, in the checkpoints of 30 longer
# ones 0.27 or more; and the same reward in each of 1,000 steps makes it 0.22.
# All: discrete actions reach the environment in the dtype of its space, which of all these
# environments is the one that they had; and each warning comes once.
PPO = "8004ae868e6502342650e7e2b57105e6b814b40833ece42e7024429c881c9bf2"
PPO_ATARI = "94a84627281a112c592fe14754ffb6440abf40862ce14982f6d6df9ee7b53310"
A2C = "cbfa11119533db83bd3fe7a44f9906177e1020d2c4fcdc513dc5ad3d8c93e543"
DOUBLE_DQN_PER = "c74b9cf2d35d956fbcc7e9954da85e0e9305549245f42e42f8786f5ac9fd76c5"
DQN = "148aa776254a939072744ef6c99d343e435183c7eeda0c97a6e427067b6353e8"
DDPG = "8f934c3beb5e75cb1bc0cf81affdc52a7a5bc2329a57a3ab4c90f960a99ffc81"
SAC = "ba8db5d13bff14439f54b96fadf5184fcfd384913fbfdc5fdd4d6cddc1d25777"
REINFORCE = "8b339d9cfade90d3cb3bfc0a1c0623f6a37f9528aacb392d35a47582cc63fdeb"
TRPO = "0b8b7046ef232f48f34291f1e448edeec15ff99df694e4a9e8c53f5bf18f373b"
SAME = {
    "ed6b5f5547b6c8aaa3e72bd861bb5b69f197b24608c706b0431f736808a39575": SAC,
    "1705030d7ac145ea359754dbeedaf68e5e0a32d37971eda718ab79cf64e76365": PPO,
    "dac62ec640b26b5863707a286ff499ee0ab8c5038bc4468f5493fbc392fdc4b5": PPO,
    "aee5aed815c815781aaed8a276ebcd036dfa35b151d578425c2e1423408e09ec": PPO,
    "ace999de98c0815b1e83ee1b57655ce576f2635325a2d69d7f6b4082721d9426": REINFORCE,
    "e931c0d0fd65ce2f95a1fcf1070f4165188372f0611d54b9bf8526d00afe1ec1": PPO_ATARI,
    "2b09f931f0b0699757d17431685fa2a0991c1ac7e5099c03f260e3a22ffa053a": A2C,
    "a96a30ea0dc9e18f97e3252ebfe7741a514134f747c518057c91cc43bd35aa5f": DOUBLE_DQN_PER,
    "6b60a94e75500d1b124dab8b03a5ff50cc49764b3c22c71c3cd7ad67704f1d78": DQN,
    "0bd92a4fdc101b2092b78079352ee6613abc1c97034c38c728360531bd63c782": PPO,
    "a3309cc75b4a9e2869c261dc08717480cc8286024bd659614baaef0b049b68ef": A2C,
    "c49eb1f63c781d01e67310b9798873bb49866c0dbca1e984d042caff912d38b0": TRPO,
    "cc5137c475c150e3cb0dbd9820cd0ccee84f50897633b9a24e86e3f8f41d7584": REINFORCE,
    "8eec9614911b13c04f7f5ca21382fe776da1f555138a8aa7ef5bf70870d3791a": A2C,
    "2a7513375d5b4c556213dd7c730d9ae303664941a1821403205152e539763fca": DDPG,
    "e6f824d23f5ea0241cdf7fa4da79ea49682af41cb5ab250cb77fa40dba314487": DOUBLE_DQN_PER,
    "f42960256d2d14b090bc5b74acdb89322b50c4c6c42edf0dd71060bddd44d307": DQN,
    "bef716f16880667436ad0ec3ac320227d301e246136801d181356cbc06986185": PPO,
    "2ce344062ed468257fb8206a5cfd4adbc45ade7675274e429887d9603ee9a4ac": PPO_ATARI,
    "4fe9096350628072947896f28bfcdb0431456e32f33db424cec5cb7dd9e5d3b8": REINFORCE,
    "bc8768e7ea737bc31ba6db89f71c4fb7d7116f2c55007eb0fc2e01a69baa643c": SAC,
    "8a9e933ece584278c34284fe289a244044206e07663d15c68de3b081cb9b34b4": TRPO,
}


def code_hash(path: Path) -> str:
    """Hash of a script's algorithm: a mended message or another log must not retire its results.

    It is of the syntax tree, without docstrings and messages, of what stands above the run
    infrastructure, and of the parts of that which step, seed and evaluate, or are not ours.
    """
    return hash_of_text(path.read_text("utf-8-sig"))


def hash_of_text(text: str) -> str:
    """The same of a script's text."""
    found = hash_of_tree(text)
    return SAME.get(found, found)


@functools.cache  # a report asks for it at every row
def hash_of_tree(text: str) -> str:
    """Of the text alone, whatever runs it may stand with."""
    tree, end = ast.parse(text), text.partition(INFRASTRUCTURE)[0].count("\n") + 1
    below = [node for part in tree.body if part.lineno > end for node in ast.walk(part)]
    kept = [part for part in tree.body if part.lineno <= end]
    kept += [node for node in below if names(node) & set(STEPPING)]
    ours = {*STEPPING, *NEUTRAL_PARTS}
    more = [part for part in tree.body if part.lineno > end and not names(part) & ours]
    kept += [part for part in more if dump(part) not in MAINS]
    docstring = tree.body[0] if ast.get_docstring(tree) else None
    kept = [part for part in kept if part is not docstring]
    for node in (node for part in kept for node in ast.walk(part)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAYING:
            node.args = [part for part in node.args if not isinstance(part, ast.JoinedStr)]
            node.args = [part for part in node.args if not isinstance(part, ast.Constant)]
    return hashlib.sha256("".join(map(dump, kept)).encode()).hexdigest()


def relevant(arguments: dict) -> dict:
    """What the numbers of a run depend on."""
    return {key: value for key, value in arguments.items() if key not in NEUTRAL}


def names(node: ast.AST) -> set[str]:
    """What a definition or an assignment defines."""
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
    return {getattr(node, "name", "")} | {getattr(target, "id", "") for target in targets}


def thin(lines: list[dict], total: int) -> list[tuple[int, float, float]]:
    """(step, mean return of the episodes that ended in the interval up to it, minutes until then).

    At most POINTS of them.
    """
    bins = defaultdict(list)
    for line in lines:
        # Scripts log no mean that is not finite, but how many episodes it is of.
        if line.get("charts/episodes") and "charts/episodic_return" in line:
            place = min(POINTS, -(-line["global_step"] * POINTS // total))
            bins[place].append(line)
    curve = []
    for place, parts in sorted(bins.items()):
        episodes = sum(line["charts/episodes"] for line in parts)
        returns = sum(line["charts/episodic_return"] * line["charts/episodes"] for line in parts)
        minutes = round(parts[-1]["wall_time"] / 60, 3)
        mean = float(f"{returns / episodes:.6g}")  # digits enough for a picture
        curve.append((place * total // POINTS, mean, minutes))
    return curve


def hardware() -> str:
    """Processor and cores of this machine."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration, IndexError):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def read_metrics(path: Path) -> list[dict]:
    """All lines but a torn last one, as kills leave it. Raises: ValueError naming a corrupt one."""
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            line["global_step"], line["wall_time"]  # what every line has
            lines.append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(texts):
                raise ValueError(f"{path} line {number} is corrupt: {text[:60]!r}") from None
    return lines


def read_run(run_dir: Path) -> dict:
    """One run: what args.json says, with curve, evaluation, code hash and wall time.

    "eval" is None where the run did not finish, or where its return is not finite: "failed" then
    says so. Raises: ValueError, naming what is wrong.
    """
    try:
        return read_parts(run_dir)
    except FileNotFoundError as error:
        raise ValueError(f"{run_dir}: no {Path(error.filename).name}: not a whole run") from None
    except Exception as error:  # a damaged file can raise anything
        text = str(error) if str(run_dir) in str(error) else f"{run_dir}: {error!r}"
        raise ValueError(f"{text}: not a whole run") from None


def read_parts(run_dir: Path) -> dict:
    """The same of a folder that is not damaged."""
    run = json.loads((run_dir / "args.json").read_text())
    args, script = run["args"], run["script"]
    total, seed = args["total_timesteps"], args["seed"]
    if type(total) is not int or type(seed) is not int:
        raise ValueError(f"total_timesteps {total!r} or seed {seed!r} is no whole number")
    text = (run_dir / script).read_text("utf-8-sig")  # as Windows' editors may save it
    run["args"] = {key: value for key, value in args.items() if key != "run_dir"}
    run["versions"] = dict(run.get("versions", {}))
    lines = read_metrics(run_dir / "metrics.jsonl")
    run["code_hash"] = hash_of_text(text)
    run["title"] = title(run_dir.name, args["env_id"])
    known = run_dir / "hardware.txt"  # jobs of a sweep have it
    run["hardware"] = known.read_text().strip() if known.exists() else None
    last = lines[-1] if lines else {"global_step": 0, "wall_time": 0.0}
    final = {key[5:]: value for key, value in last.items() if key.startswith("eval/")}
    for value in final.values():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{value!r} among the results of its evaluation")
    done = last["global_step"] >= total and "episodes" in final
    curve = thin(lines, max(total, last["global_step"]))
    failed = "the return of its evaluation is not finite"
    return run | {
        "steps": last["global_step"],
        "wall_time": round(last["wall_time"], 1),
        "eval": final if done and "episodic_return" in final else None,
        "failed": failed if done and "episodic_return" not in final else None,
        "curve": [(step, value) for step, value, _ in curve],
        "minutes": [minutes for _, _, minutes in curve],
        "evaluations": [
            (line["global_step"], line["eval/episodic_return"], line["wall_time"] / 60)
            for line in lines
            if "eval/episodic_return" in line
        ],
    }


def title(folder: str, env_id: str) -> str:
    """What a row is called: the environment, and the name of the suite's group, if it has one."""
    form = re.escape(folder_name(env_id)) + r"(?:~\w+)?(, .+?)?__.*"
    match = re.fullmatch(form, folder)
    return env_id + ((match and match[1]) or "")


def folder_name(env_id: str) -> str:
    """Without what separates folders, or drives on Windows."""
    return env_id.replace("/", "-").replace(":", "-")


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders among the paths and right below them. Raises: ValueError if one has none."""
    found = []
    for path in paths:
        below = sorted(inner.parent for inner in path.glob("*/args.json"))
        below = [run for run in below if not re.search(r"\.old-\d+$", run.name)]  # set aside
        runs = [path] if (path / "args.json").exists() else below
        if not runs:
            what = "holds no run" if path.is_dir() else "is not there"
            raise ValueError(f"{path} {what}")
        found += runs
    return list(dict.fromkeys(found))


def collect(run_dir: Path) -> Path:
    """Add one run to the results.

    Raises: ValueError if it is not a whole run, or would replace one that is finished by one that
    is not, one of today's code by one of other code, or one of other arguments.
    """
    run = read_run(run_dir)
    args, curve = run["args"], run.pop("curve")
    del run["minutes"], run["evaluations"]
    folder = RESULTS / Path(run["script"]).stem / folder_name(run["title"])
    folder.mkdir(parents=True, exist_ok=True)
    meta = folder / "meta.json"
    try:
        runs = dict(json.loads(meta.read_text()) if meta.exists() else {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{meta}: {error}") from None
    if old := runs.get(str(args["seed"])):
        if old["eval"] and not run["eval"]:
            raise ValueError(f"{run_dir}: {meta} has a finished run of this seed, this one is not")
        script = ROOT / run["script"]
        today = code_hash(script) if script.exists() else None
        if old["code_hash"] == today != run["code_hash"]:
            raise ValueError(f"{run_dir}: {meta} has a run of today's {script.name}, this one not")
        was, now = relevant(old["args"]), relevant(args)
        if differ := [key for key in sorted(was | now) if was.get(key) != now.get(key)]:
            said = ", ".join(f"{key} {was.get(key)} there, {now.get(key)} here" for key in differ)
            raise ValueError(f"{run_dir}: {meta} has another run of this seed: {said}")
    runs[str(args["seed"])] = run
    runs = {seed: runs[seed] for seed in sorted(runs, key=int)}
    meta.write_text(json.dumps(runs, indent=1) + "\n")
    with open(folder / f"{args['seed']}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", "episodic_return"])
        writer.writerows(curve)
    return folder


def load(script: str) -> list[dict]:
    """The collected runs of a script, like read_run gives them. Raises: ValueError."""
    runs = []
    for meta in sorted((RESULTS / script).glob("*/meta.json")):
        try:
            for seed, run in json.loads(meta.read_text()).items():
                if run["script"] != f"{script}.py":
                    raise ValueError(f"a run of {run['script']} in the folder of {script}.py")
                with open(meta.parent / f"{seed}.csv") as file:
                    _, *rows = csv.reader(file)
                runs.append(run | {"curve": [(int(step), float(value)) for step, value in rows]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{meta}: {error}") from None
    return runs


@functools.cache
def references() -> dict[tuple[str, str, str], dict]:
    """(algorithm, environment, label) -> row of reference_results.csv."""
    with open(ROOT / "benchmark" / "reference_results.csv") as file:
        return {(r["algorithm"], r["env_id"], r["label"]): r for r in csv.DictReader(file)}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        folders = run_folders(map(Path, sys.argv[1:]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    problems = 0
    for folder in folders:
        try:
            print(collect(folder), folder.name)
        except (OSError, ValueError) as error:
            print(f"not collected: {error}", file=sys.stderr)
            problems += 1
    sys.exit(1 if problems else 0)
