"""A pretend GPU: training at full size on a machine without one, in seconds and without the memory.

Tensors know their shape, type and device (cuda:0) but hold no numbers (torch's FakeTensorMode). Every operation is
checked as CUDA would check it, and what a GPU would be asked for can be counted: bytes, FLOPs, copies, and the places
where the host waits for the device.

    import tools.pretend_gpu                        # before torch, and in a process of its own
    from tools.pretend_gpu.gpu import GPU, pretend_gpu
    with pretend_gpu() as gpu:                      # full-size models in place of downloaded weights
        policy = load_painter(config, GPU)
        ...
        gpu.memory.peak, gpu.flops.total            # bytes, FLOPs
        gpu.watch.problems, gpu.watch.waits

Not modelled: the CUDA context, the workspaces of cuDNN and cuBLAS, NCCL's buffers, fragmentation, and the speed of
kernels. Values: a question that only data could answer is answered as in a run that goes well.
"""

from tools.pretend_gpu import shim

shim.load()
