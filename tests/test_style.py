"""The rules that keep nine complete files from drifting apart, checked on the source."""

import ast
import difflib
import itertools
import re

import pytest
from conftest import OURS, ROOT

# Same name, different source: allowed only here, with the reason.
VARIANTS: dict[str, str] = {
    "Args": "fields and defaults differ; a field of the same name keeps its type and help",
    "train": "the algorithm",
    "make_envs": "games of Atari step at the same time",
    "make_env": "the spaces that an algorithm can handle differ",
    "make_networks": "each algorithm has its own networks",
    "make_buffer": "the class of the replay memory differs",
    "make_optimizer": "RMSProp in the form that the published results of each algorithm used",
    "check_args": "each algorithm has its own arguments",
}
# Args fields that differ in type and help between scripts, with the reason.
FIELD_VARIANTS: dict[str, str] = {
    "learning_rate": "of Adam, or of the optimizer that is chosen",
    "precision": "which network computes in bfloat16",
    "buffer_size": "some scripts: Atari too",
    "learning_starts": "DQN explores by epsilon from the start",
    "anneal_lr": "PPO names its source; TRPO: --max-kl, and only the critic has a learning rate",
    "env_id": "some scripts: Atari too, or alone",
    "num_envs": "REINFORCE: it is the number of episodes, too; ppo_atari: of all processes",
    "env_kwargs": "of games: another constructor",
    "num_steps": "A2C: an iteration has many updates",
    "num_minibatches": "ppo_atari: of whole time steps",
    "critic_learning_rate": "A2C: not on Atari; SAC: of V, too",
    "optimizer": "the form of RMSProp differs",
    "norm_adv": "in minibatches, in the batch, without the mean, or over the run",
    "max_grad_norm": "of both networks together, or of each",
    "log_std_init": "of continuous ones, if a script has others; REINFORCE names no source",
    "compile": "REINFORCE and TRPO: of the critic alone; ppo_atari: of acting, too",
    "torch_threads": "ppo_atari: its network gains from a second one",
}
LINES = {
    "dqn": 1230,
    "double_dqn_per": 1314,
    "a2c": 1400,
    "reinforce": 1220,
    "trpo": 1295,
    "ppo_atari": 1306,
}  # in all; others at most 1200
COMMON_FLAGS = """env_id seed total_timesteps num_envs device torch_threads compile run_dir track
wandb_project_name wandb_entity capture_video checkpoint_frequency resume evaluate eval_frequency
eval_episodes env_kwargs async_envs""".split()
BANNERS = ["Setup", "1. Act", "2. Step the environments", "3. Targets", "4. Update"]
BANNERS += ["5. Log, checkpoint, evaluate"]
INFRASTRUCTURE = "# ---- Run infrastructure: the same bytes in every script"


@pytest.fixture(params=OURS)
def script(request):
    """Scripts of a user's own need not look like ours."""
    return request.param


def source(script):
    return (ROOT / f"{script}.py").read_text()


def definitions(text):
    """Top-level name -> its source, with the comment lines above it."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *[d.lineno for d in node.decorator_list]]) - 1
            while lines[start - 1].startswith("#") and not lines[start - 1].startswith("# ----"):
                start -= 1
            found[node.name] = "\n".join(lines[start : node.end_lineno])
    return found


def fields(text):
    """Args field -> (type, help)."""
    body = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "Args").body
    found = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            help_text = after.value.value if isinstance(after, ast.Expr) else ""
            found[node.target.id] = (ast.unparse(node.annotation), help_text)
    return found


def drift(texts):
    """Definitions of one name whose source differs between scripts, as diffs."""
    first, diffs = {}, []
    for script, text in texts.items():
        for name, body in definitions(text).items():
            where, known = first.setdefault(name, (script, body))
            if known != body and name not in VARIANTS:
                pair = (known.splitlines(), body.splitlines(), where, script)
                diffs.append("\n".join(difflib.unified_diff(*pair, lineterm="")))
    return diffs


def infrastructure(text):
    """Without what ppo_atari alone has below it: a run of several processes."""
    end = text.find("\n\n# ---- Several processes")
    end = end if end > 0 else text.index('\n\nif __name__ == "__main__"')
    return text[text.index(INFRASTRUCTURE) : end]


def test_same_name_same_bytes():
    assert not (found := drift({s: source(s) for s in OURS})), "\n\n".join(found)


def test_drift_is_seen():
    text = source("ppo_continuous")
    changed = text.replace("finish(self) -> None", "finish(self)", 1)
    assert changed != text and len(drift({"one": text, "two": changed})) == 1


def test_the_infrastructure_is_the_same_in_all():
    assert len({infrastructure(source(script)) for script in OURS}) == 1


def test_same_field_same_type_and_help():
    known = {}
    for script in OURS:
        for name, meaning in fields(source(script)).items():
            same = known.setdefault(name, meaning) == meaning
            assert same or name in FIELD_VARIANTS, f"{script}: --{name}"


def test_layout_of_a_script(script):
    text = source(script)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    docstring = ast.get_docstring(ast.parse(text))
    assert "arXiv:" in docstring and "Deviations from the paper" in docstring
    assert f"python {script}.py" in docstring and len(docstring.splitlines()) <= 35
    arguments = fields(text)
    assert set(COMMON_FLAGS) <= arguments.keys()
    for name, (_, help_text) in arguments.items():
        assert help_text, f"{name} has no help text"
    train = definitions(text)["train"]
    positions = [train.find(f"# {banner}\n") for banner in BANNERS]
    assert -1 not in positions and positions == sorted(positions)
    assert len(lines) <= LINES.get(script, 1200)
    loop = next(n for n, line in enumerate(lines, 1) if line.startswith("    while "))
    assert loop < 400 and "def train(" in "\n".join(lines[:loop])


def test_at_most_two_names_in_an_assignment(script):
    """Three or more are crammed; only what a function returns, such as env.step, is taken apart."""
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = len(node.targets[0].elts)
            assert names <= 2 or not isinstance(node.value, ast.Tuple | ast.GeneratorExp), (
                f"{script}.py, line {node.lineno}"
            )


def test_train_is_short(script):
    train = next(n for n in ast.parse(source(script)).body if getattr(n, "name", "") == "train")
    lines = source(script).splitlines()[train.lineno - 1 : train.end_lineno]
    assert sum(bool(line.strip()) for line in lines) <= 140


def test_a_script_imports_nothing_from_here(script):
    ours = {path.stem for path in ROOT.glob("*.py")} | {"benchmark", "tests"}
    for node in ast.walk(ast.parse(source(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        assert not {name.split(".")[0] for name in names} & ours


def test_checkpoints_never_run_code(script):
    loads = re.findall(r"torch\.load\(.*", source(script))
    assert loads and all("weights_only=True" in line for line in loads)
    assert "pickle" not in source(script)


def test_pure_functions_stay_pure(script):
    """Those below the banner `Mathematics of ...`."""
    (body,) = re.findall(r"^# ---- Mathematics of .*?(?=^# ---- )", source(script), re.M | re.S)
    assert "def " in body and not re.search(r"\bargs\b|\.item\(|print\(|global ", body)
