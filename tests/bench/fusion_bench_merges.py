"""fusion-bench's own merges of files, by its own code; run with the interpreter of ``make bench-peers``.

Usage: fusion_bench_merges.py DIRECTORY SCALE DENSITY: reads base.safetensors and expert*.safetensors there, writes a
file a method. Tensors are (m, n) or (n,), which is all that its spectral methods treat.
"""

import sys
from pathlib import Path

import torch
from fusion_bench.method.dare.utils import param_random_drop_
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging, vector_to_state_dict
from fusion_bench.method.wudi.wudi import wudi_merging
from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul, state_dict_sum
from safetensors.torch import load_file, save_file
from torch import nn


class Checkpoint(nn.Module):
    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))


def main():
    directory, scale, density = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    base = load_file(directory / "base.safetensors")
    experts = [load_file(path) for path in sorted(directory.glob("expert*.safetensors"))]
    taus = [{name: expert[name] - base[name] for name in base} for expert in experts]

    def save(method, change):
        state = {name: (base[name] + scale * change[name]).contiguous() for name in base}
        save_file(state, directory / f"{method}.safetensors")

    def copies():
        return [{name: tensor.clone() for name, tensor in tau.items()} for tau in taus]

    save("tsv_m", compute_and_sum_svd_mem_reduction(copies(), accelerator="cpu"))
    save("iso_c", iso_c(copies(), accelerator="cpu"))
    # Its steps are 1e-5 long whatever the numbers are: a thousandth of the distance to its minimum.
    small = [{name: 0.1 * tau[name] for name in tau if name == "even"} for tau in copies()]
    wudi = wudi_merging(small, accelerator="cpu", iter_num=3000)
    save_file({n: base[n] + 10 * wudi[n].detach() for n in wudi}, directory / "wudi.safetensors")
    flat = torch.vstack([state_dict_to_vector(tau) for tau in copies()])
    elected = ties_merging(flat, reset_thresh=density, merge_func="mean")
    save("ties", vector_to_state_dict(elected, copies()[0]))
    dropped = copies()
    torch.manual_seed(0)
    for tau in dropped:
        for name in tau:
            parameter = nn.Parameter(tau[name], requires_grad=False)
            param_random_drop_(parameter, 1 - density, rescale=True)
            tau[name] = parameter.data
    save("dare", {name: sum(tau[name] for tau in dropped) for name in base})
    # Its arithmetic and not its task_arithmetic_merge, which in 0.2.33 refuses modules of Parameters.
    save_file(state_dict_add(base, state_dict_mul(state_dict_sum(taus), scale)), directory / "sum.safetensors")
    merged = simple_average([Checkpoint(expert) for expert in experts])
    save_file(
        {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}, directory / "mean.safetensors"
    )


main()
