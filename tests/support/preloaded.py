"""What the process has imported from which children of tests are forked: imports alone, for no thread is forked along.

huggingface_hub is not among it: it settles where it looks when it is imported, and tests have it look elsewhere.
"""

import jinja2
import r2m.commands.main
import r2m.distributed
import r2m.merge
import r2m.refit
import torch
import yaml

import r2m_kernels._native

torch.set_num_threads(1)
IMPORTED = (jinja2, r2m, r2m_kernels, yaml)
