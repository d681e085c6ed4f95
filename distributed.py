"""What torchrun needs: several processes that train one model. Alone, a process is rank 0 of 1.

Rank 0 speaks and writes. Run it: `torchrun --nproc_per_node 2 distributed.py` says who is there. Read `train.py` next.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def ranks():
    """(rank, world size) of this process; (0, 1) outside of torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes():
    """Find the others that torchrun, or whoever says RANK and MASTER_ADDR as it does, started."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")


def gather(number):
    """The numbers of all ranks in their order, a list. Every rank must call, and waits for the last one."""
    rank, world_size = ranks()
    if world_size == 1:
        return [number]
    numbers = torch.zeros(world_size, dtype=torch.float64)
    numbers[rank] = number
    dist.all_reduce(numbers)
    return numbers.tolist()


def barrier():
    """Wait until every rank is here."""
    gather(0)


def end_run(message, code):
    """End the program early, in every process, with a message on standard error."""
    if ranks()[0] == 0:
        print(f"\n{message}", file=sys.stderr)
    barrier()  # torchrun ends the others when one leaves: let rank 0 finish
    raise SystemExit(code)


def wrap(model, parallel, device):
    """What to call in place of the model so that the ranks' gradients are averaged; fsdp divides `model` among them."""
    _, world_size = ranks()
    if world_size == 1:
        return model
    if parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world_size,))
    for module in (*model.layers, model):  # a block's matrices are gathered when it runs
        fully_shard(module, mesh=mesh)
    return model


def sync_gradients(wrapped, last):
    """Let the next backward exchange gradients only if it is the step's last."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # fsdp
        wrapped.set_requires_gradient_sync(last)
    elif ranks()[1] > 1:
        wrapped.require_backward_grad_sync = last


def full_state(model, optimizer):
    """(weights, the optimizer's state), by name, on the CPU, and as one process would have them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(model, optimizer, weights, moments):
    """What `full_state` gave, back into a model and an optimizer of any number of processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    how = dict(model_state_dict=weights, optim_state_dict=moments)
    set_state_dict(model, optimizer, **how, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


if __name__ == "__main__":
    join_processes()
    print(f"{ranks()[1]} processes, which add up their ranks to {sum(gather(ranks()[0])):g}")
