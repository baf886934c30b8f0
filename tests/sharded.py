"""Run several cases on the ranks started by torchrun, with DistributedDataParallel or sharded.

    torchrun -m tests.sharded CASES.json [RANKS PER MACHINE]

Each case is [name, arguments of d2v-train, fused]. Writes each rank's share of weights, optimizer and checkpoint to
NAME/share-RANK.json.
"""

import gc
import json
import logging
import os
import sys
from pathlib import Path

import torch

from d2v_fast.config import parse
from d2v_fast.sharding import own
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop


def size(tensors):
    """Bytes of the tensors by file, without random numbers and digests, which only rank 0 has."""
    kept = [values for file, values in tensors.items() if not file.startswith(("rng", "samples"))]
    return sum(x.numel() * x.element_size() for values in kept for x in values.values())


def main(file):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name, arguments, fused in json.loads(Path(file).read_text()):
        run = build(parse(arguments)[0], fused)
        parameters = list(run.state.core.parameters())
        assert loop(run) == 0
        kept = [x for state in run.state.optimizer.state.values() for x in state.values() if x.ndim]
        share = {
            "parameters": sum(own(p).numel() for p in parameters) / sum(p.numel() for p in parameters),
            "optimizer": sum(own(x).numel() for x in kept) / sum(x.numel() for x in kept),
            "copy": size(run.checkpoints._copies) / size(run.state.tensors()),
        }
        Path(name, f"share-{run.accelerator.process_index}.json").write_text(json.dumps(share))
        del run, parameters, kept
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        os.environ["LOCAL_WORLD_SIZE"] = sys.argv[2]
    main(sys.argv[1])
