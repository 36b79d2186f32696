"""Every tensor is on the run's device. Without a GPU, PyTorch's meta device stands in for one."""

import pytest
import torch
import torch.fx.experimental._config
from conftest import ROOT, checkpoint, load, load_file, run

LAYER = '''
class EinsumLinear(nn.Linear):
    """Its weight's gradient has another memory layout than the weight."""

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


@dataclass(frozen=True)
class Args:'''
ATARI = """--env-id ALE/Breakout-v5 --total-timesteps 120 --log-frequency 60 --eval-episodes 1
--num-envs 2""".split()
REPLAY = ["--learning-starts", 80, "--buffer-size", 100]


@pytest.fixture
def meta_device(monkeypatch):
    """Tensors there have no values, but mixing them with the CPU's raises, as it does on CUDA."""
    tensor = torch.Tensor

    def zeros(x):
        return torch.zeros(x.shape, dtype=x.dtype)

    def patch(name, value):
        original = getattr(tensor, name)
        monkeypatch.setattr(
            tensor, name, lambda x, *rest: value(x) if x.is_meta else original(x, *rest)
        )

    patch("cpu", zeros)
    patch("item", lambda x: 0.01)
    patch("__float__", lambda x: 0.01)
    patch("tolist", lambda x: zeros(x).tolist())
    patch("__bool__", lambda x: True)
    adam = torch.optim.Adam.__init__

    def unfused(self, *arguments, fused=False, **options):
        adam(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "__init__", unfused)
    autocast = torch.autocast

    def known(device_type, *arguments):
        return autocast("cpu" if device_type == "meta" else device_type, *arguments)

    monkeypatch.setattr(torch, "autocast", known)

    def put(module):
        setup = module.setup
        monkeypatch.setattr(module, "setup", lambda args: (torch.device("meta"), setup(args)[1]))
        monkeypatch.setattr(module.Run, "save_checkpoint", lambda self: None)
        monkeypatch.setattr(module, "LONGEST_EPISODE", 50)

    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        yield put  # a mask selects everything there


def test_no_tensor_is_left_on_the_cpu(script, meta_device, tmp_path):
    meta_device(load(script))
    run(script, "--run-dir", tmp_path / "r")


@pytest.mark.parametrize("script", ["dqn", "double_dqn_per", "a2c"])
def test_nor_on_atari(script, meta_device, tmp_path):
    pytest.importorskip("ale_py")
    meta_device(load(script))
    replay = [] if script == "a2c" else REPLAY
    run(script, *ATARI, *replay, "--run-dir", tmp_path / "r", "--device", "cpu", quick=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu(script, tmp_path):
    run(script, "--run-dir", tmp_path / "r", "--device", "cuda")
    run(script, "--resume", tmp_path / "r", "--total-timesteps", 1024, quick=False)


def test_gradients_of_any_memory_layout(script, tmp_path):
    """Fused Adam reads a weight and its gradient in memory order: the layouts have to agree.

    A copy whose layers produce gradients of another layout learns the same with an optimizer that
    does not care.
    """
    text = (ROOT / f"{script}.py").read_text().replace("nn.Linear(", "EinsumLinear(")
    text = text.replace("\n@dataclass(frozen=True)\nclass Args:", LAYER)
    assert text.count("EinsumLinear(") >= 2 and "fused=True" in text
    for name in ("fused", "unfused"):
        path = tmp_path / f"{name}_{script}.py"
        path.write_text(text if name == "fused" else text.replace("fused=True", "fused=False"))
        words = ["--total-timesteps", 128]  # later, rounding alone makes differences
        run(script, "--run-dir", tmp_path / name, *words, module=load_file(path))
    fused, unfused = (checkpoint(tmp_path / name) for name in ("fused", "unfused"))
    networks = [name for name in fused if name in ("actor", "critic", "agent", "q_network")]
    assert networks
    for network in networks:
        for weight, expected in zip(
            fused[network].values(), unfused[network].values(), strict=True
        ):
            close = torch.isclose(weight, expected, rtol=1e-3, atol=1e-4)
            assert close.float().mean() > 0.9  # Adam's first steps make much of tiny differences
