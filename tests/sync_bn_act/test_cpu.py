"""SyncBatchNorm in fused blocks: two gloo processes against PyTorch's BatchNorm in one process on
the joined batch."""

import copy
import inspect

import pytest
import torch
import torch.multiprocessing as mp
from agreement import agree
from bn_act_cases import NAMES, assert_rule
from sync_bn_processes import (
    BLOCKS,
    OPS,
    PROCESSES,
    PROJECTION,
    SPLITS,
    images,
    main,
    net,
    penalty,
    step,
    sync,
    train,
)
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm

import fused_res
from fused_res import fuse_, optimize_for_inference
from fused_res.dispatch import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, all in one start of them: it takes seconds."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        mp.start_processes(main, (str(folder),), PROCESSES, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def joined(parts, batched, summed):
    """One result of the parts': the batch's in a row, sums of gradients, all others the same."""
    first = parts[0]
    if first is None:
        return None
    if batched:
        return torch.cat(parts)
    if summed:
        return sum(t.double() for t in parts).to(first.dtype)
    for other in parts[1:]:
        assert torch.equal(first, other)
    return first


@pytest.mark.parametrize("i", range(len(OPS)), ids=lambda i: "-".join(map(str, OPS[i])))
def test_op_within_the_rule(found, i):
    def ours(case):
        return [joined(t, k < 3, k < 7) for k, t in enumerate(zip(*runs[id(case)], strict=True))]

    cases = OPS[i].cases()
    runs = {id(case): [process["ops"][i][k] for process in found] for k, case in enumerate(cases)}
    if OPS[i].dtype != "float64":
        return assert_rule(cases, ours)
    for case in cases:  # PyTorch's is what is exact
        for name, a, b in zip(NAMES, ours(case), case.run(torch.float64, "eager"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_a_large_mean_costs_no_digits(found):
    """By the rule alone it might: PyTorch's error is 1e-4 there."""
    i = next(i for i, op in enumerate(OPS) if op.mean == 2000)
    for k, case in enumerate(OPS[i].cases()):
        y = torch.cat([process["ops"][i][k][0] for process in found]).double()
        exact = case.run(torch.float64, "eager")[0]
        torch.testing.assert_close(y, exact, rtol=0, atol=4e-6)


def test_bitwise_the_same_on_every_run(found):
    for process in found:
        for first, again in zip(process["ops"][-5], process["again"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def joined_outcomes(parts):
    return {
        name: joined(
            [p[name] for p in parts], name in ("output", "gradient of x"), "gradient" in name
        )
        for name in parts[0]
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_block_within_the_rule(found, name):
    block, rows = BLOCKS[name], []
    for draw in range(block.draws):
        plain, (x, dy) = block.plain(draw), block.batch(draw)
        exact = step(copy.deepcopy(plain).double(), x.double(), dy.double())
        ours = joined_outcomes([process["blocks"][name][draw] for process in found])
        rows.append((ours, step(plain, x, dy), exact))
    if block.dtype != "float64":
        return agree(*map(list, zip(*rows, strict=True)), what=name)
    for ours, theirs, _ in rows:
        close(ours, theirs)


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-9, atol=1e-9, msg=name)


def test_one_collective_each_way(found):
    both, one, frozen_input = found[0]["collectives"]
    assert both == one == {"all_gather": 1, "all_reduce": 1}
    assert frozen_input == {"all_gather": 1}


def test_a_frozen_norm_beside_one_that_trains(found):
    for i, name in enumerate(("downsample.1", "bn1")):
        plain = PROJECTION.plain(1)
        plain.get_submodule(name).eval()
        close(
            joined_outcomes([p["frozen_parts"][i] for p in found]),
            step(plain, *PROJECTION.batch(1)),
        )


def test_without_gradients(found):
    plain, (x, _) = PROJECTION.plain(0), PROJECTION.batch(0)
    expected = {"output": plain(x).detach()} | dict(plain.named_buffers())
    close(joined_outcomes([p["without_gradients"] for p in found]), expected)


def test_compiled(found):
    expected = step(PROJECTION.plain(0), *PROJECTION.batch(0))
    close(joined_outcomes([p["compiled"] for p in found]), expected)


def test_second_derivatives(found):
    expected = [penalty(net(), images(split)) for split in SPLITS for _ in ("cpu", "eager")]
    for i, theirs in enumerate(expected):
        close(joined_outcomes([p["second_derivatives"][i] for p in found]), theirs)


@pytest.mark.parametrize("split", SPLITS)
def test_ddp(found, split):
    x = images(split)
    expected = train(net(), x, len(x))
    for process in found:
        close(process["ddp"][list(SPLITS).index(split)], expected)


def test_alone_it_is_a_batch_norm(found):
    for process in found:
        equal, calls = process["alone"]
        assert equal and not calls


def test_a_hooked_norm_is_pytorchs_own(found):
    assert all("expected input tensor to be on GPU" in process["hooked"] for process in found)


def test_other_devices_run_pytorchs_own(found):
    names = list(inspect.signature(SyncBatchNorm.forward).parameters)[1:]
    assert names == ["input", "weight", "bias", "running_mean", "running_var", "eps", "momentum",
                     "process_group", "world_size"]  # fmt: skip
    assert all(process["on_another_device"] for process in found)


# --- without other processes


def test_fused_before_and_after_it_is_converted():
    x, dy = PROJECTION.batch(0)
    plain, before, after = (PROJECTION.plain(0) for _ in range(3))
    parameters = dict(before.named_parameters())
    before = sync(before)
    keys = list(before.state_dict())
    assert fuse_(before).fused == [""]
    fuse_(after)
    after = sync(after)
    expected = step(plain, x, dy)
    for model in (before, after):
        with fused_res.backend("cpu"):
            close(step(model, x, dy), expected)
    assert list(before.state_dict()) == keys
    assert all(p is parameters[name] for name, p in before.named_parameters())
    assert isinstance(before.bn1, nn.SyncBatchNorm)
    fused_res.unfuse_(before)
    assert type(before) is type(plain)


def test_optimized_for_inference():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), net()[1].float())
    x = torch.randn(2, 3, 9, 8)
    expected = model.eval()(x)
    served = optimize_for_inference(sync(model), x, tune=False)
    assert served.report.fused == ["3", "0 + 1 + 2"] and not served.report.skipped
    torch.testing.assert_close(served(x), expected, rtol=1e-4, atol=1e-4)
