"""The README's table and picture, made from the committed results alone.

    python -m benchmark.report

Rewrites what stands between the result markers of README.md, and benchmark/results/*.png. The
picture carries a hash of its data, so that a test can tell whether it is the newest.
"""

import hashlib
import json
from pathlib import Path

from benchmark.results import RESULTS, ROOT, code_hash, load, mean_and_std, references

ALGORITHMS = {"ppo_continuous": "PPO"}
BEGIN, END = "<!-- results: python -m benchmark.report -->", "<!-- end of results -->"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito: told apart by everybody


def table(script: str) -> str:
    """Markdown table of one script: final evaluations beside published numbers."""
    algorithm, published = ALGORITHMS[script], references()
    now = code_hash(ROOT / f"{script}.py")
    rows = [
        f"| `{script}.py` | final return, mean ± std | each seed | best published | CleanRL |",
        "|---|---|---|---|---|",
    ]
    sources = []
    for env_id, seeds in load(script).items():
        finals = {seed: run["eval"]["episodic_return"] for seed, run in seeds.items()}
        mean, std = mean_and_std(list(finals.values()))
        older = "" if all(run["code_hash"] == now for run in seeds.values()) else " (older code)"
        each = ", ".join(f"{value:.0f}" for value in finals.values())
        cells = []
        for label in ("best", "CleanRL"):
            if row := published.get((algorithm, env_id, label)):
                note = "{published_env}, {metric}, {seeds} seeds: {source}".format(**row)
                sources += [note] if note not in sources else []
                number = f"{float(row['mean']):.0f} ± {float(row['std']):.0f}"
                cells.append(f"{number} [{sources.index(note) + 1}]")
            else:
                cells.append("")
        ours = f"| {env_id}{older} | **{mean:.0f} ± {std:.0f}** | {each} | "
        rows.append(ours + " | ".join(cells) + " |")
    notes = [f"[{n}] {text}  " for n, text in enumerate(sources, 1)]
    return "\n".join([*rows, "", *notes])


def data_hash(script: str) -> str:
    """Hash of everything that the picture shows."""
    shown = {e: {s: r["curve"] for s, r in seeds.items()} for e, seeds in load(script).items()}
    shown["references"] = [r for k, r in sorted(references().items()) if k[0] == ALGORITHMS[script]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def picture(script: str) -> Path:
    """Learning curves, one panel an environment: seeds thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, published = load(script), references()
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.4), squeeze=False)
    for axis, (env_id, seeds) in zip(axes[0], results.items(), strict=True):
        points = {}
        for run in seeds.values():
            steps, returns = zip(*run["curve"], strict=True)
            axis.plot([s / 1e6 for s in steps], returns, color=BLUE, alpha=0.3, linewidth=0.8)
            for step, value in run["curve"]:
                points.setdefault(step, []).append(value)
        steps = sorted(step for step, values in points.items() if len(values) == len(seeds))
        means = [sum(points[step]) / len(seeds) for step in steps]
        label = f"mean of {len(seeds)} seeds"
        axis.plot([s / 1e6 for s in steps], means, color=BLUE, linewidth=2, label=label)
        for name, color, style in (("best", ORANGE, "--"), ("CleanRL", GREY, ":")):
            if row := published.get((ALGORITHMS[script], env_id, name)):
                text = "best published" if name == "best" else name
                axis.axhline(float(row["mean"]), color=color, linestyle=style, label=text)
        axis.set_title(env_id)
        axis.set_xlabel("environment steps (millions)")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("return of training episodes")
    handles, labels = axes[0][0].get_legend_handles_labels()
    labels[0] = "mean over seeds (thin: each seed)"
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path = RESULTS / f"{script}.png"
    figure.savefig(path, dpi=110, metadata={"Data": data_hash(script), "Software": None})
    return path


def readme_with_results() -> str:
    """README.md with the part between the markers made anew."""
    text = (ROOT / "README.md").read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts = []
    for script in ALGORITHMS:
        image = f"![Learning curves of {script}.py](benchmark/results/{script}.png)"
        parts += [table(script), "", image, ""]
    return before + BEGIN + "\n\n" + "\n".join(parts) + "\n" + END + after


if __name__ == "__main__":
    for name in ALGORITHMS:
        print(picture(name))
    (ROOT / "README.md").write_text(readme_with_results())
