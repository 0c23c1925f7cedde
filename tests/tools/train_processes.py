"""What the processes of ``tests/train/test_distributed.py`` do."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_res import cli, models
from fused_res.dispatch import first_use, user_timings
from fused_res.nn.blocks import FusedForward
from fused_res.train.data import Data, statistics
from fused_res.train.engine import Trainer
from fused_res.train.place import Place
from fused_res.train.settings import Settings

PROCESSES = 2
DRAWS = 3
NETS = {
    "resnet": {"counts": (1, 1), "width": 8},
    "net_res_deep": {"n_blocks": 2},
    "wrn16_8": {"widen_factor": 1},
    "net_batchnorm": {},
}
CASES = [("resnet", True), ("net_res_deep", True), ("wrn16_8", True), ("net_batchnorm", False)]
FUSED = [name for name, fused in CASES if fused]
RUN = ["train", "resnet", "--model-arg", "counts=1,1", "--model-arg", "width=8", "--size", "8",
       "--images", "60", "--batch-size", "7", "--grad-accumulation", "2", "--epochs", "3",
       "--dropout", "0.2", "--ema", "0.9", "--sync-bn", "--augment", "--compare",
       "--save-every", "2"]  # fmt: skip


def data(draw: int) -> Data:
    """12 images of three classes."""
    generator = torch.Generator().manual_seed(draw)
    images = torch.randint(256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (12,), generator=generator)
    return Data("noise", ("a", "b", "c"), images, labels, images, labels, "")


def gradients(name: str, draw: int, place: Place, folder: Path, fused=True, double=False) -> dict:
    """Of the first step of training by two batches, of which the processes have 3 and 2 images; and
    running statistics."""
    settings = Settings(
        batch_size=5, grad_accumulation=2, epochs=2, sync_bn=True, l2=1e-3, label_smoothing=0.1,
        augment=True, seed=draw,
    )  # fmt: skip
    pictures = data(draw)
    mean, std = statistics(pictures.train_images)
    torch.manual_seed(draw)
    model = models.create(name, fused=fused, num_classes=3, **NETS[name])
    if double:
        model.double().register_forward_pre_hook(lambda _, args: (args[0].double(),))
    trainer = Trainer({"net": model}, pictures, settings, place, folder, {"mean": mean, "std": std})
    found = {}

    def keep(*_):
        if not found:
            found.update({f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()})
            found.update({n: b.clone() for n, b in model.named_buffers()})

    def look(_, bucket):
        exchanged.append([p.data_ptr() for p in bucket.parameters()])
        return allreduce_hook(None, bucket)

    trainer.nets[0].optimizer.register_step_pre_hook(keep)
    exchanged = []
    if place.world > 1:
        trainer.nets[0].wrapped.register_comm_hook(None, look)
    trainer.run(None)
    # one exchange a step, not a batch, in one order: another rounds sums in another way
    assert place.world == 1 or (len(exchanged) == 2 and exchanged[0] == exchanged[1])
    return found


def sharded(name: str) -> dict[str, list]:
    """Two steps of a net that FSDP shards block by block, and of one that it does not."""
    torch.manual_seed(0)
    ours, theirs = (models.create(name, num_classes=3, **NETS[name]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in [m for m in ours.modules() if isinstance(m, FusedForward)]:
        fully_shard(block, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (ours, theirs)]
    found = {"gradients": [], "parameters": [], "outputs": []}
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(3, (8,))
    images = images.contiguous(memory_format=torch.channels_last)
    parts = list(zip(images.chunk(PROCESSES), labels.chunk(PROCESSES), strict=True))
    for _ in range(2):
        x, y = parts[dist.get_rank()]
        F.cross_entropy(ours(x), y).backward()
        for x, y in parts:
            (F.cross_entropy(theirs(x), y) / PROCESSES).backward()
        pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        found["gradients"] += [(p.grad.full_tensor(), q.grad) for p, q in pairs]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found["parameters"] += [(p.full_tensor(), q.detach()) for p, q in pairs]
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        b.copy_(a)  # of this process's images alone
    with torch.no_grad():
        found["outputs"].append((ours.eval()(images), theirs.eval()(images)))
    return found


def measured(rank: int, folder: str) -> None:
    """Makes a trainer where ``auto`` follows measurements, and tells what was measured."""
    torch.set_num_threads(1)
    first_use.DEVICE_TYPES = ("cpu",)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=PROCESSES)  # fmt: skip
    pictures = data(0)
    model = models.create("resnet", num_classes=3, counts=(1,), width=8)
    place = Place(torch.device("cpu"), rank, PROCESSES)
    settings = Settings(batch_size=5, epochs=1)  # 3 images and 2
    mean, std = statistics(pictures.train_images)
    trainer = Trainer({"net": model}, pictures, settings, place, Path(folder),
                      {"mean": mean, "std": std})  # fmt: skip
    calls = first_use._spent.calls
    trainer.run(None)
    found = {
        "before": calls,
        "in training": first_use._spent.calls - calls,
        "rows": sorted(user_timings.table(place.device).rows),
        "decided": sorted(v.name for k, v in first_use._decided.items() if k[0] == "block_train"),
        "reasons": [v.reason for k, v in first_use._decided.items() if k[0] == "block_train"],
    }
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # as in main


def main(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # as torchrun does
        "TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    assert cli.main([*RUN, "--out", f"{folder}/whole"]) == 0
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    place = Place(torch.device("cpu"), rank, PROCESSES)
    found = {
        "gradients": {
            case: [gradients(case[0], draw, place, Path(folder), case[1]) for draw in range(DRAWS)]
            for case in CASES
        },
        "sharded": {name: sharded(name) for name in FUSED},
    }
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # Python's shutdown may race with gloo's threads: pytorch#117762
