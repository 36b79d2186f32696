"""ppo_atari.py, whose processes all leave their weights behind: torchrun ... two_processes.py."""

import os
import sys
from pathlib import Path

import torch
from conftest import ROOT, load_file

module = load_file(ROOT / "ppo_atari.py")
make_run = module.make_run


def make(args, device, envs, state, policy):
    run = make_run(args, device, envs, state, policy)
    finish, rank = run.finish, int(os.environ["RANK"])

    def save():
        finish()
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        saved = {"agent": state["agent"].state_dict(), "games": len(envs.envs), "threads": names}
        torch.save(saved, f"{os.environ['WEIGHTS']}/{rank}.pt")

    run.finish = save
    return run


module.make_run = make
sys.argv[0] = str(ROOT / "ppo_atari.py")
module.train(module.parse_args(module.Args))
