"""Imported by the server that tests' processes are forked from: what they would each import, and warm caches."""

import gc

import accelerate  # noqa: F401
import numpy.ctypeslib  # noqa: F401
import torch._dynamo
import torch._inductor
import torch.distributed.fsdp  # noqa: F401
import typeguard  # noqa: F401

import nndist.cli.train
import nndist.report.run_page
import nndist.training.run
from nndist.flags.parse import parse_flags

parse_flags(nndist.Recipe, ["any"], quiet=True)  # tyro, and what it finds out of RunConfig: a third of a short training
gc.collect()
gc.freeze()  # else the first collection in each process would copy all of these objects
