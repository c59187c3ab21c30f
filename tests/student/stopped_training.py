"""Run by hand or by torchrun: train a recipe, and die by SIGKILL after a given step (0: never)."""

import os
import signal
import sys

import torch
import transformers

from kdcache.recipe import load_recipe
from kdcache.student import assembly
from kdcache.student.distill import distill
from kdcache.student.processes import leave

torch.set_num_threads(1)
step, path, *overrides = sys.argv[1:]


class Kill(transformers.TrainerCallback):
    """Between the step and its checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)


class KilledTrainer(assembly.DistillationTrainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_callback(Kill())


assembly.DistillationTrainer = KilledTrainer
distill(load_recipe(path, overrides), resume=True)
leave()
