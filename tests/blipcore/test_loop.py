"""The loop: a run is a function of its settings, whether it was interrupted or spread over processes or not."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from blipcore.errors import ModelError
from blipcore.training.loop import BatchOrder, Samples, fit
from blipcore.training.run_log import RunLog
from blipcore.training.settings import LoopSettings, rate_at, run_recipe_cli
from tests.tiny import ROOT


class Line(nn.Module):
    """y = model(x) with dropout: what a step's random state must reproduce."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, batch):
        if self.training:
            self.seen += 1
        return {"loss": (self.model(batch["x"]) - batch["y"]).square().mean()}


def collate(items):
    x = torch.tensor(np.stack(items), dtype=torch.float32)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def jitter(sample, rng):
    return sample + 0.1 * rng.standard_normal(3) + 0.1 * torch.randn(3).numpy()


def points(count=40):
    return list(np.random.default_rng(0).standard_normal((count, 3)))


def run(out, steps, *, objective=None, **values):
    objective = objective or Line()
    options = {
        "rate": 0.05,
        "batch_size": 8,
        "save_every": 1,
        "precision": "fp32",
        "device": "cpu",
        "schedule": "constant",
    }
    settings = LoopSettings(out=out, steps=steps, **(options | values))
    fit(objective, points(), jitter, collate, settings)
    return objective


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_an_interrupted_run_goes_on_to_the_same_losses_and_weights(tmp_path):
    whole = run(tmp_path / "whole", 20, average_decay=0.9)
    run(tmp_path / "parts", 7, average_decay=0.9)
    rest = run(tmp_path / "parts", 20, average_decay=0.9)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    saved = [torch.load(tmp_path / part / "weights.pt", weights_only=True) for part in ("whole", "parts")]
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name]), name
    last = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["objective"]["model.0.weight"]
    assert not torch.equal(saved[0]["0.weight"], last)  # the average, not the last step
    assert torch.equal(saved[0]["0.weight"], whole.model[0].weight)  # and that is what the caller goes on with


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    small = run(tmp_path / "small", 5, batch_size=4, accumulate=2, clip=0.0, objective=still())
    large = run(tmp_path / "large", 5, batch_size=8, clip=0.0, objective=still())
    torch.testing.assert_close(small.model[0].weight, large.model[0].weight, atol=1e-6, rtol=1e-5)


def still() -> Line:
    line = Line()
    line.model[1].p = 0.0
    return line


def test_it_learns_and_draws_curves(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, 200, objective=still())
    found = losses(tmp_path)
    assert found[200] < 0.1 * found[10]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"schedule": "x"}, {"rate": 0.0}, {"accumulate": 0}, {"device": "gpu"}])
def test_settings_that_cannot_be_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoopSettings(out=".", **wrong)


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(ModelError, match="another batch_size, seed"):
        run(tmp_path, 4, batch_size=4, seed=3)


def test_a_finished_run_still_tells_its_figures(tmp_path):
    settings = LoopSettings(out=tmp_path, steps=3, batch_size=8, precision="fp32", device="cpu")
    parts = (points(), jitter, collate, settings)
    assert fit(Line(), *parts, evaluate=lambda: {"figure": 1.0}) == {"figure": 1.0}
    assert fit(Line(), *parts, evaluate=lambda: {"figure": 2.0}) == {"figure": 2.0}


def test_an_interrupted_run_with_everything_on_logs_the_same_losses(tmp_path):
    options = {
        "schedule": "cosine",
        "accumulate": 2,
        "batch_size": 4,
        "average_decay": 0.9,
        "precision": "bf16",
        "workers": 1,
    }
    whole = run_until(tmp_path / "whole", None, options)
    with pytest.raises(KeyboardInterrupt):
        run_until(tmp_path / "parts", 33, options)  # the 34th micro-batch: in the middle of step 17
    rest = run_until(tmp_path / "parts", None, options)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


def run_until(out, micro_batches, options):
    class Stopping(Line):
        def forward(self, batch):
            if self.seen == micro_batches:
                raise KeyboardInterrupt
            return super().forward(batch)

    return run(out, 30, objective=Stopping(), save_every=10, **options)


def test_a_log_holds_means_of_what_was_there_and_small_rates(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", every=2)
    log.step(1, {"loss": 1.0, "rare": 3.0, "rate": 1.25e-6})
    log.step(2, {"loss": 2.0, "rate": 1.25e-6})
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert (row["loss"], row["rare"], row["rate"]) == (1.5, 3.0, 1.25e-6)


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path, 2)
    other = Line()
    other.model = nn.Linear(3, 1)
    with pytest.raises(ModelError, match="choose another --out"):
        run(tmp_path, 4, objective=other)


def test_a_diverging_run_stops_with_the_way_out(tmp_path):
    broken = Line()
    with torch.no_grad():
        broken.model[0].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="lower --rate"):
        run(tmp_path, 2, objective=broken)


def test_an_epoch_holds_every_sample_once_and_processes_share_it():
    order = BatchOrder(10, 2, seed=1, world=2, rank=0), BatchOrder(10, 2, seed=1, world=2, rank=1)
    alone = BatchOrder(10, 4, seed=1)
    streams = [iter(part) for part in order]
    for joint, _ in zip(alone, range(6), strict=False):
        assert joint == next(streams[0]) + next(streams[1])
    first = [item for batch, _ in zip(alone, range(alone.per_epoch), strict=False) for item in batch]
    assert len({number for _, number in first}) == 8 and {epoch for epoch, _ in first} == {0}


def test_a_later_start_is_the_rest_of_the_same_order():
    whole, late = BatchOrder(10, 3, seed=1), BatchOrder(10, 3, seed=1, start=4)
    expected = [batch for batch, _ in zip(whole, range(9), strict=False)]
    assert [batch for batch, _ in zip(late, range(5), strict=False)] == expected[4:]


def test_an_unreadable_sample_is_replaced_and_an_unreadable_set_is_an_error(caplog):
    def read(sample, _):
        if sample == "bad":
            raise OSError("truncated")
        return sample

    assert Samples(["bad", "good"], read, 0)[0, 0] == "good"
    assert "truncated" in caplog.text
    with pytest.raises(ModelError, match="cannot be read"):
        Samples(["bad"] * 3, read, 0)[0, 0]


def test_rates():
    settings = LoopSettings(out=".", rate=1.0, warmup=10, warmup_rate=0.1, min_rate=0.2)
    assert rate_at(settings, 0, 100, 10) == pytest.approx(0.1)
    assert rate_at(settings, 5, 100, 10) == pytest.approx(0.55)
    assert rate_at(settings, 100, 100, 10) == pytest.approx(0.2)
    decay = LoopSettings(out=".", rate=1.0, schedule="decay", min_rate=0.5)
    assert [round(rate_at(decay, step, 100, 10), 3) for step in (9, 10, 25, 99)] == [1.0, 0.9, 0.81, 0.5]


def test_settings_become_options(tmp_path):
    seen = []
    run_recipe_cli(LoopSettings, seen.append, "About.", ["--out", str(tmp_path), "--rate", "0.5", "--steps", "3"])
    assert (seen[0].out, seen[0].rate, seen[0].steps, seen[0].seed) == (tmp_path, 0.5, 3, 0)
    with pytest.raises(SystemExit):
        run_recipe_cli(LoopSettings, seen.append, "About.", [])


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from blipcore.training import blip_objectives
from blipcore.training.blip_objectives import Pretraining, Retrieval, SimpleRetrieval
from tests.blipcore.steps import batch_of, fixed_noise
from tests.tiny import tiny_blip

torch.set_num_threads(1)
options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
blip_objectives.distributed.shared_noise = fixed_noise
world, rank = accelerator.num_processes, accelerator.process_index
joint = batch_of(4)
batch = {name: value[rank * 4 // world : (rank + 1) * 4 // world] for name, value in joint.items()}
found = {}
for kind in (Pretraining, Retrieval, SimpleRetrieval):
    model = tiny_blip()
    torch.manual_seed(5)
    objective = kind(model) if kind is SimpleRetrieval else kind(model, queue=8, alpha=0.4, ramp=0)
    wrapped = accelerator.prepare(objective)
    for _ in range(2):  # the second step reads what the first one queued
        model.zero_grad()
        losses = wrapped(batch)
        accelerator.backward(losses["loss"])
    found[f"{kind.__name__} loss"] = accelerator.reduce(losses["loss"].detach(), "mean")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"{kind.__name__} gradient of {name}"] = parameter.grad
    for name, buffer in objective.named_buffers():
        if "queue" in name:
            found[f"{kind.__name__} {name}"] = buffer
if accelerator.is_main_process:
    torch.save(found, sys.argv[1])
accelerator.end_training()  # a process that ends while gloo's threads still run is aborted now and then
"""


def test_two_processes_compute_the_gradients_of_one_on_the_joint_batch(tmp_path):
    pytest.importorskip("accelerate")
    (script := tmp_path / "step.py").write_text(TWO_PROCESSES)
    results = []
    for world in (1, 2):
        out, port = tmp_path / f"{world}.pt", free_port()
        processes = [launch(script, out, rank, world, port) for rank in range(world)]
        for process in processes:
            assert process.wait(timeout=240) == 0, process.stderr.read().decode()
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one.keys() == two.keys()
    assert sum("Pretraining gradient" in name for name in one) > 50
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3, msg=name)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(script, out, rank, world, port):
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    if world == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name)
    return subprocess.Popen([sys.executable, str(script), str(out)], env=environment, stderr=subprocess.PIPE)
